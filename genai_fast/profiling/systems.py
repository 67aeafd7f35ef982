"""The systems whose training step is measured: as their authors write them in plain PyTorch, and as we train them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from genai_fast.config import Config
from genai_fast.errors import UsageError
from genai_fast.models import dcgan_init, peers, peers_sequences, peers_text, settings
from genai_fast.models.peers_text import language_model_step
from genai_fast.models.registry import RECIPES, make
from genai_fast.training import Step, make_optimizer

RunStep = Callable[..., Any]
Prepare = Callable[[nn.Module, str], nn.Module]  # a model and the method that the script calls -> it, wrapped


def as_it_is(model: nn.Module, method: str = "forward") -> nn.Module:
    return model


@dataclass(frozen=True)
class System:
    """A recipe, its settings, a batch, and the same in plain PyTorch.

    `plain` and the recipe's own step take images [batch, *shape], in [-1, 1] or [0, 1] as the model wants, and labels
    where it has classes.
    """

    recipe: str
    config: Config
    batch: int
    shape: tuple[int, ...]
    script: Callable[[Any, str, Prepare], RunStep] | None = None  # (system, device, prepare); None: nobody's
    signed: bool = True
    plain_scale: int = 1  # the plain script's loss over ours: those that sum over the batch say the batch
    tolerance: float = 5e-3  # of the losses, relative: noise, dropout and a narrow type differ
    classes: int = 0

    @property
    def block(self) -> int:
        """Tokens of a sample, where text runs on from sample to sample."""
        return 0

    def inputs(self, device: str) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        count = self.batch * getattr(self.config, "n_critic", 1)
        x = torch.rand(count, *self.shape, generator=generator).to(device)
        x = x * 2 - 1 if self.signed else x
        if not self.classes:
            return (x,)
        return x, torch.randint(self.classes, (count,), generator=generator).to(device)

    def model(self) -> nn.Module:
        return make(self.recipe, self.config, self.shape, self.classes)

    def plain(self, device: str, prepare: Prepare = as_it_is) -> RunStep:
        """The step that people write; `prepare` is called with each of its networks."""
        return self.script(self, device, prepare)

    def fused(self, device: str) -> Step:
        """What `genai-fast train` runs."""
        model = self.model().to(device)
        optimizer = make_optimizer(model, self.config)
        return Step(model, optimizer, clip=self.config.clip, precision=self.config.precision)


@dataclass(frozen=True)
class TextSystem(System):
    """A recipe for text: ids of `vocabulary`, shape (tokens,); the plain one has the same weights."""

    vocabulary: int = 512

    @property
    def block(self) -> int:
        return self.shape[0] if RECIPES[self.recipe].feed in ("windows", "streams") else 0

    def inputs(self, device: str) -> tuple[torch.Tensor, ...]:
        (tokens,), generator = self.shape, torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary, (self.batch, tokens + 1), generator=generator).to(device)
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        lengths = torch.full((self.batch,), tokens, device=device)
        return {
            "windows": (x, y),
            "streams": (x, y, torch.ones(self.batch, device=device)),
            "sequences": (x, lengths),
            "pairs": (x, lengths, y, lengths),
        }[RECIPES[self.recipe].feed]

    def model(self) -> nn.Module:
        return RECIPES[self.recipe].build(self.config, self.vocabulary, self.vocabulary - 1)


def _vae(peer: type[nn.Module]) -> Callable[..., RunStep]:
    return lambda system, device, prepare: peers.vae_step(prepare(peer(), "forward"), device)


def _pair(generator: type[nn.Module], discriminator: type[nn.Module], init: Any = as_it_is) -> Callable[..., RunStep]:
    def script(system: System, device: str, prepare: Prepare) -> RunStep:
        pair = generator(), discriminator()  # both before they are initialised, as `fused` draws them
        networks = [prepare(init(network), "forward") for network in pair]
        return peers.gan_step(*networks, 100, device)

    return script


def _text(
    peer: Callable[..., nn.Module], recipe: str, config: Any, batch: int, tokens: int, vocabulary: int = 512,
    **options: Any,
) -> TextSystem:  # fmt: skip
    def script(system: TextSystem, device: str, prepare: Prepare) -> RunStep:
        weights = system.model().state_dict()  # first: drawn as `fused` draws them
        model = peer(system.vocabulary)
        model.load_state_dict(weights, strict=False)  # a count of steps is not a weight
        step = language_model_step(prepare(model, "loss"), device, config.lr)
        return (lambda x, y: step(x)) if recipe == "vrnn" else step  # which predicts x from nothing

    return TextSystem(recipe, config, batch, (tokens,), script, vocabulary=vocabulary, **options)


# Without dropout, clipping and decay, which the plain scripts do not have either.
_PLAIN = {"clip": 0.0, "warmup": 0, "decay": "none"}
_GPT = {**_PLAIN, "dropout": 0.0, "weight_decay": 0.0, "beta2": 0.999}


_DCGAN = _pair(peers.EagerDCGANGenerator, peers.EagerDCGANDiscriminator, dcgan_init)

# The first system of a recipe stands for it where a recipe is named.
SYSTEMS = {
    "mlp_vae": System(
        "vae", settings.VAEConfig(), 128, (1, 28, 28), _vae(peers.EagerMLPVAE), signed=False,
        plain_scale=128,
    ),
    "mlp_gan": System(
        "mlp-gan", settings.GANConfig(), 128, (1, 28, 28),
        _pair(peers.EagerMLPGenerator, peers.EagerMLPDiscriminator),
    ),
    "dcgan_64": System("dcgan", settings.DCGANConfig(), 64, (3, 64, 64), _DCGAN),
    "dense_dcgan": System(
        "dcgan", settings.DCGANConfig(network="dense"), 128, (1, 28, 28),
        _pair(peers.EagerDenseGenerator, peers.EagerDenseDiscriminator), tolerance=0.05,
    ),
    "dcgan_64_bfloat16": System(
        "dcgan", settings.DCGANConfig(precision="bfloat16"), 64, (3, 64, 64), _DCGAN, tolerance=0.05
    ),
    "conv_vae_64": System(
        "conv-vae", settings.ConvVAEConfig(), 64, (3, 64, 64), _vae(peers.EagerConvVAE)
    ),
    "gpt_nano": _text(peers_text.EagerGPT, "gpt", settings.GPTConfig(**_GPT), 16, 256),
    "gpt_nano_bfloat16": _text(
        peers_text.EagerGPT, "gpt", settings.GPTConfig(**_GPT, precision="bfloat16"), 16, 256, tolerance=0.05
    ),
    "lstm": _text(peers_text.EagerLSTMLanguageModel, "lstm", settings.LSTMConfig(**_PLAIN), 32, 128, 8192),
    "seq2seq": _text(
        lambda v: peers_sequences.EagerSeq2Seq(v, v - 1, 64, dropout=0.0), "seq2seq",
        settings.Seq2SeqConfig(**_PLAIN, dropout=0.0, block=64), 32, 64, 4096,
    ),
    "text_vae": _text(
        lambda v: peers_sequences.EagerTextVAE(v, v - 1, word_dropout=0.0), "text-vae",
        settings.TextVAEConfig(**_PLAIN, annealing=0, word_dropout=0.0), 32, 64, 4096,
    ),
    "vrnn": _text(peers_sequences.EagerVRNN, "vrnn", settings.VRNNConfig(**_PLAIN), 32, 64, 256),
}  # fmt: skip

# What a CPU takes too long for.
GPU_SYSTEMS = {
    "dcgan_64_batch128": replace(SYSTEMS["dcgan_64"], batch=128),
    "dcgan_64_bfloat16_batch128": replace(SYSTEMS["dcgan_64_bfloat16"], batch=128),
    "gpt2_bfloat16": _text(
        lambda v: peers_text.EagerGPT(v, 1024, 12, 12, 768),
        "gpt",
        settings.GPTConfig(**_GPT, precision="bfloat16", block=1024, layers=12, heads=12, width=768),
        8,
        1024,
        50257,
        tolerance=0.05,
    ),
}


def of_recipe(name: str, batch: int | None = None, precision: str = "float32") -> System:
    """The system that stands for a recipe; with that many samples a step (None: as the system has it).

    A recipe that nobody's plain script is listed for has no `script`; its images are 64 x 64 pixels in 3 colours.

    Raises:
        UsageError: there is no such recipe.
    """
    if name not in RECIPES:
        raise UsageError(f"expected a recipe, one of {', '.join(RECIPES)}, got {name!r}")
    system = next((s for s in SYSTEMS.values() if s.recipe == name), None)
    if system is None:
        config = RECIPES[name].config()
        system = System(name, config, config.batch_size, (3, 64, 64), classes=10 if RECIPES[name].labelled else 0)
    batch = batch or system.batch
    return replace(system, batch=batch, config=replace(system.config, batch_size=batch, precision=precision))
