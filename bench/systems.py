"""The systems whose training step is measured: as their authors write them in plain PyTorch, and as we train them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from genai_fast.models import dcgan_init, peers, peers_sequences, peers_text
from genai_fast.models.peers_text import language_model_step
from genai_fast.training import Step, make_optimizer, settings
from genai_fast.training.config import Config
from genai_fast.training.recipes import RECIPES, make

RunStep = Callable[..., Any]


@dataclass(frozen=True)
class System:
    """A recipe, its settings, a batch, and the same in plain PyTorch.

    plain(device) and the recipe's own step take images [batch, *shape], in [-1, 1] or [0, 1] as the model wants.
    """

    recipe: str
    config: Config
    batch: int
    shape: tuple[int, ...]
    plain: Callable[[str], RunStep]
    signed: bool = True
    plain_scale: int = 1  # the plain script's loss over ours: those that sum over the batch say the batch
    tolerance: float = 5e-3  # of the losses, relative: noise, dropout and a narrow type differ

    def inputs(self, device: str) -> tuple[torch.Tensor, ...]:
        x = torch.rand(self.batch, *self.shape, generator=torch.Generator().manual_seed(0)).to(device)
        return (x * 2 - 1 if self.signed else x,)

    def model(self) -> nn.Module:
        return make(self.recipe, self.config, self.shape, 0)

    def fused(self, device: str) -> Step:
        """What `genai-fast train` runs."""
        model = self.model().to(device)
        optimizer = make_optimizer(model, self.config)
        return Step(model, optimizer, clip=self.config.clip, precision=self.config.precision)


@dataclass(frozen=True)
class TextSystem(System):
    """A recipe for text: ids of `vocabulary`, shape (tokens,); the plain one has the same weights."""

    vocabulary: int = 512

    def inputs(self, device: str) -> tuple[torch.Tensor, ...]:
        (tokens,), generator = self.shape, torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary, (self.batch, tokens + 1), generator=generator).to(device)
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        lengths = torch.full((self.batch,), tokens, device=device)
        return {
            "windows": (x, y), "streams": (x, y, torch.ones(self.batch, device=device)),
            "sequences": (x, lengths), "pairs": (x, lengths, y, lengths),
        }[RECIPES[self.recipe].feed]  # fmt: skip

    def model(self) -> nn.Module:
        return RECIPES[self.recipe].build(self.config, self.vocabulary, self.vocabulary - 1)


def _dcgan(device: str) -> RunStep:
    pair = peers.EagerDCGANGenerator(), peers.EagerDCGANDiscriminator()
    return peers.gan_step(*map(dcgan_init, pair), 100, device)


def _text(
    peer: Callable[..., nn.Module], recipe: str, config: Any, batch: int, tokens: int, vocabulary: int = 512,
    **options: Any,
) -> TextSystem:  # fmt: skip
    def plain(device: str) -> RunStep:
        weights = system.model().state_dict()  # first: drawn as `fused` draws them
        model = peer(vocabulary)
        model.load_state_dict(weights, strict=False)  # a count of steps is not a weight
        step = language_model_step(model, device, config.lr)
        return (lambda x, y: step(x)) if recipe == "vrnn" else step  # which predicts x from nothing

    system = TextSystem(recipe, config, batch, (tokens,), plain, vocabulary=vocabulary, **options)
    return system


# Without dropout, clipping and decay, which the plain scripts do not have either.
_PLAIN = {"clip": 0.0, "warmup": 0, "decay": "none"}
_GPT = {**_PLAIN, "dropout": 0.0, "weight_decay": 0.0, "beta2": 0.999}


SYSTEMS = {
    "mlp_vae": System(
        "vae", settings.VAEConfig(), 128, (1, 28, 28), lambda d: peers.vae_step(peers.EagerMLPVAE(), d), signed=False,
        plain_scale=128,
    ),
    "mlp_gan": System(
        "mlp-gan", settings.GANConfig(), 128, (1, 28, 28),
        lambda d: peers.gan_step(peers.EagerMLPGenerator(), peers.EagerMLPDiscriminator(), 100, d),
    ),
    "dense_dcgan": System(
        "dcgan", settings.DCGANConfig(network="dense"), 128, (1, 28, 28),
        lambda d: peers.gan_step(peers.EagerDenseGenerator(), peers.EagerDenseDiscriminator(), 100, d), tolerance=0.05,
    ),
    "dcgan_64": System("dcgan", settings.DCGANConfig(), 64, (3, 64, 64), _dcgan),
    "dcgan_64_bfloat16": System(
        "dcgan", settings.DCGANConfig(precision="bfloat16"), 64, (3, 64, 64), _dcgan, tolerance=0.05
    ),
    "conv_vae_64": System(
        "conv-vae", settings.ConvVAEConfig(), 64, (3, 64, 64), lambda d: peers.vae_step(peers.EagerConvVAE(), d)
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
