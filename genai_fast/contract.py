"""What training asks of a model. Nothing here is to be inherited: a model offers what it has by these names."""

import inspect
from collections.abc import Generator, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn


class HasTrainingStep(Protocol):
    def training_step(self, *batch: torch.Tensor) -> Any:
        """The loss, or a NamedTuple of 0-d tensors that begins with it or has a field `loss`; see `training.Step`."""


class InTurns(Protocol):
    """Networks against each other. They are fed whole batches only."""

    def turns(self, *batch: torch.Tensor) -> Generator[tuple[Iterable[nn.Parameter], torch.Tensor], None, Any]:
        """Yields (parameters, loss) for each update; returns the losses."""


class HasNetworks(Protocol):
    def networks(self) -> dict[str, nn.Module]:
        """What is trained, by names and in the order of the turns; setting `lr_<name>` is a network's learning rate."""


class HasAfterStep(Protocol):
    def after_step(self) -> None:
        """Called after each step that updated something, such as for a moving average."""


class AdaptsRates(Protocol):
    """Learning rates that follow what the networks do."""

    def rate_factors(self) -> dict[str, torch.Tensor]:
        """Names of `networks()` -> by what their learning rates are multiplied now, 0-d, from a buffer; {}: fixed."""

    def adapt_rates(self, losses: Any) -> None:
        """Called after each step with its losses, those of all processes."""


class Carries(Protocol):
    """A state that continues from batch to batch and is not part of the state dict."""

    def carried(self) -> dict[str, torch.Tensor]:
        """Copies of it, [layers, rows, ...] each, for a checkpoint."""

    def load_carried(self, state: Mapping[str, torch.Tensor]) -> None: ...


class Shards(Protocol):
    def shards(self) -> list[list[nn.Module]]:
        """The modules whose weights, gradients and optimizer state are divided together among processes (FSDP2)."""


class HasAddedTensors(Protocol):
    """added_tensors: names in the state dict that checkpoints of earlier versions lack; they stay as they are then."""

    added_tensors: tuple[str, ...]


class ImageTraits(NamedTuple):
    """What a model of images says of itself, by attributes of these names; without one, the default holds."""

    signed: bool = False  # its images are in [-1, 1] rather than [0, 1]
    classes: int = 0  # it takes labels in [0, classes) after the images; 0: no labels
    n_critic: int = 1  # batches in a step
    latent: int = 0  # dimensions of z; 0: it has none
    likelihood: str = "gaussian"  # of a pixel; "bernoulli": `decode` gives logits
    nats: bool = True  # a generator's loss is -ln D(G(z))
    logits: bool = False  # a discriminator's outputs are logits, so that its accuracy in a step tells how it fares


def varies(model: Any) -> bool:
    """Whether a model says, by an attribute `varies`, that its steps differ in more than the batch: those of a penalty
    every few steps do. No CUDA graph is captured of them."""
    return bool(getattr(model, "varies", False))


def image_traits(model: Any) -> ImageTraits:
    return ImageTraits(*(getattr(model, name, default) for name, default in ImageTraits._field_defaults.items()))


def offers(model: Any, protocol: type) -> bool:
    """Whether a model has all methods of a protocol.

    By getattr, since wrappers pass methods on, which isinstance does not see from Python 3.12 on.
    """
    names = [name for name, member in vars(protocol).items() if inspect.isfunction(member) and name[0] != "_"]
    return all(callable(getattr(model, name, None)) for name in names)


def networks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The networks that a model trains: itself, as "", if it does not name any."""
    return model.networks() if offers(model, HasNetworks) else {"": model}
