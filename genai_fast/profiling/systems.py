"""The systems whose training step is measured: in plain PyTorch, and as we train them. Recipes declare them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from genai_fast.config import Config
from genai_fast.contract import networks_of
from genai_fast.errors import UsageError
from genai_fast.models.common.recipe import Bench, Values
from genai_fast.models.registry import RECIPES
from genai_fast.training import Step, make_optimizer

RunStep = Callable[..., Any]
Prepare = Callable[[nn.Module, str], nn.Module]  # a model and the method that the plain loop calls -> it, wrapped

# Without clipping and decay, which the plain loop does not have either.
PLAIN = {"clip": 0.0, "warmup": 0, "decay": "none"}


def as_it_is(model: nn.Module, method: str = "forward") -> nn.Module:
    return model


@dataclass(frozen=True)
class System:
    """A recipe, its settings, a batch, and the same in plain PyTorch.

    Both steps take images or log-mel spectrograms [batch, *shape], in [-1, 1] or [0, 1] as the model wants, and labels
    where it has classes; of waveforms codes, and the codes after them, [batch, *shape]; of text ids of `vocabulary`,
    shape (tokens,), as the recipe's feed gives them; of a translation images of both sets.
    """

    recipe: str
    config: Config
    batch: int
    shape: tuple[int, ...]
    vocabulary: int = 512
    tolerance: float = 5e-3  # of the losses, relative
    classes: int = 0

    @property
    def is_text(self) -> bool:
        return bool(RECIPES[self.recipe].feed)

    @property
    def plain_scale(self) -> int:
        """The plain loop's loss over ours."""
        return self.batch if RECIPES[self.recipe].summed else 1

    @property
    def signed(self) -> bool:
        return RECIPES[self.recipe].model.signed

    @property
    def block(self) -> int:
        """Tokens of a sample, where text runs on from sample to sample."""
        return self.shape[0] if RECIPES[self.recipe].feed in ("windows", "streams") else 0

    @property
    def _of_data(self) -> tuple[Any, ...]:
        return (self.vocabulary, self.vocabulary - 1) if self.is_text else (self.shape, self.classes)

    @property
    def values(self) -> Values:
        return RECIPES[self.recipe].values(self.config, *self._of_data)

    def inputs(self, device: str) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        if self.is_text:
            return self._ids(device, generator)
        if RECIPES[self.recipe].waves:
            return self._codes(device, generator)
        count = self.batch * getattr(self.config, "n_critic", 1)
        x = torch.rand(count, *self.shape, generator=generator).to(device)
        x = x * 2 - 1 if self.signed else x
        if RECIPES[self.recipe].translates:
            return x, x.flip(0, 3)
        if not self.classes:
            return (x,)
        return x, torch.randint(self.classes, (count,), generator=generator).to(device)

    def _ids(self, device: str, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        (tokens,) = self.shape
        ids = torch.randint(self.vocabulary, (self.batch, tokens + 1), generator=generator).to(device)
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        lengths, carry = torch.full((self.batch,), tokens, device=device), torch.ones(self.batch, device=device)
        pairs = (x, lengths, y, lengths)
        by_feed = {"windows": (x, y), "streams": (x, y, carry), "sequences": (x, lengths), "pairs": pairs}
        return by_feed[RECIPES[self.recipe].feed]

    def _codes(self, device: str, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        codes = torch.randint(256, (self.batch, self.shape[0] + 1), generator=generator).to(device)
        labels = torch.randint(max(self.classes, 1), (self.batch,), generator=generator).to(device)
        return codes[:, :-1].contiguous(), codes[:, 1:].contiguous(), *([labels] if self.classes else [])

    def model(self) -> nn.Module:
        return RECIPES[self.recipe].make(self.config, *self._of_data)

    def plain(self, device: str, prepare: Prepare = as_it_is) -> RunStep:
        """The step that people write, from the weights of `fused`; `prepare` is called with each of its networks."""
        recipe = RECIPES[self.recipe]
        ours, networks = networks_of(self.model()), {}
        with torch.random.fork_rng([]):  # the noise that follows is drawn as `fused` draws it
            made = {name: kind(**arguments) for name, (kind, arguments) in recipe.twins(self.values).items()}
        for name, network in made.items():
            network.load_state_dict(ours[name].state_dict())
            networks[name] = prepare(network, "loss" if self.is_text else "forward")
        return recipe.loop(networks, self.values, device)

    def fused(self, device: str) -> Step:
        """What `genai-fast train` runs."""
        model = self.model().to(device)
        optimizer = make_optimizer(model, self.config)
        return Step(model, optimizer, clip=self.config.clip, precision=self.config.precision)


def _system(recipe: str, bench: Bench) -> System:
    kind = RECIPES[recipe]
    config = kind.config(**{**PLAIN, **bench.settings})
    classes = 10 if kind.labelled else 0
    return System(recipe, config, bench.batch, bench.shape, bench.vocabulary, bench.tolerance, classes)


def _systems(gpu: bool) -> dict[str, System]:
    return {b.name: _system(name, b) for name, recipe in RECIPES.items() for b in recipe.benches if b.gpu == gpu}


SYSTEMS = _systems(gpu=False)
GPU_SYSTEMS = _systems(gpu=True)  # what a CPU takes too long for


def of_recipe(name: str, batch: int | None = None, precision: str = "float32") -> System:
    """The system that stands for a recipe, its first; with that many samples a step (None: as the system has it).

    If it has none, the images are 64 x 64 pixels in 3 colours.

    Raises UsageError: there is no such recipe.
    """
    if name not in RECIPES:
        raise UsageError(f"expected a recipe, one of {', '.join(RECIPES)}, got {name!r}")
    benches = RECIPES[name].benches or (Bench(name, RECIPES[name].config().batch_size, (3, 64, 64)),)
    system = _system(name, benches[0])
    batch = batch or system.batch
    return replace(system, batch=batch, config=replace(system.config, batch_size=batch, precision=precision))
