"""What training is fed with: batches in an order that a resumed run finds again."""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import nn

from genai_fast import data
from genai_fast.config import ImageConfig
from genai_fast.contract import InTurns, image_traits, offers
from genai_fast.data import Augment, Images

Batch = tuple[torch.Tensor, ...]
_OTHER = 0x9E3779B9  # added to the seed for a second set


class Feed(Protocol):
    """A data set in batches; every tensor of a batch has a sample a row."""

    names: tuple[str, ...]  # of a batch's tensors, in messages and files
    samples: int  # in an epoch
    steps: int  # batches in an epoch
    size: int  # samples of a batch; an epoch's last one may have fewer
    rows: Callable[[int], torch.Tensor] | None  # a batch's samples -> which of them `epoch` gives; None: all

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """An epoch's batches from number `start` on; their order is a function of the seed and `epoch` alone."""
        ...

    def all(self) -> Iterator[Batch]:
        """Every sample once, in order and unchanged: for validation."""
        ...


class ImageFeed:
    """Images as a model wants them, by its `contract.ImageTraits`; one in turns gets whole batches only."""

    names = ("images", "labels")
    rows: Callable[[int], torch.Tensor] | None = None

    def __init__(self, model: nn.Module, images: Images, config: ImageConfig) -> None:
        self._images, self._config, self._model = images, config, model
        self.size = config.batch_size * image_traits(model).n_critic
        self._whole = offers(model, InTurns)
        self.steps = len(images) // self.size if self._whole else math.ceil(len(images) / self.size)
        self.samples = self.steps * self.size if self._whole else len(images)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        config, traits = self._config, image_traits(self._model)
        return data.batches(
            self._images, self.size, config.seed, epoch, start, signed=traits.signed,
            labels=bool(traits.classes), whole=self._whole, augment=self._augment(), rows=self.rows,
        )  # fmt: skip

    def _augment(self) -> Augment | None:
        config = self._config
        return Augment(config.flip, config.crop, config.rotate, config.jitter, config.zoom)

    def all(self) -> Iterator[Batch]:
        size = self._config.batch_size
        for first in range(0, len(self._images), size):
            yield batch_for(self._model, self._images, slice(first, first + size))


class SoundFeed(ImageFeed):
    """Log-mel spectrograms of clips, unchanged."""

    names = ("spectrograms", "labels")

    def _augment(self) -> None:
        return None


class TranslationFeed:
    """Batches (a, b) of two sets of images, [B, C, H, W] each, in [-1, 1] if the model wants that; whole ones only.

    Without pairs each set has an order and augmentation of its own, and the smaller one starts again, in another order,
    until the larger one is through. Both images of a pair are augmented alike.

    Args:
        pairs: image k of both sets belong together; the sets are equally large then.
    """

    names = ("a", "b")
    rows: Callable[[int], torch.Tensor] | None = None

    def __init__(self, model: nn.Module, a: Images, b: Images, config: ImageConfig, *, pairs: bool) -> None:
        self._sets, self._config, self._model, self._pairs = (a, b), config, model, pairs
        self.size = config.batch_size
        self.steps = max(len(a), len(b)) // self.size
        self.samples = self.steps * self.size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        config = self._config
        augment = Augment(config.flip, config.crop, config.rotate, config.jitter, config.zoom)
        # Seeds that differ: else images of the two sets that have the same place in an epoch would be turned alike.
        seeds = [config.seed, config.seed if self._pairs else (config.seed + _OTHER) % (1 << 32)]
        orders = [self._order(images, seed, epoch) for images, seed in zip(self._sets, seeds, strict=True)]
        for number in range(start, self.steps):
            where = slice(number * self.size, (number + 1) * self.size)
            taken = (self.size, self.rows(self.size)) if self.rows else None
            found = []
            for images, order, seed in zip(self._sets, orders, seeds, strict=True):
                chosen = order[where] if taken is None else order[where][taken[1]]
                x = images.batch(chosen)
                x = augment(x, seed, epoch, number, taken) if augment else x
                found.append(data.to_signed(x) if image_traits(self._model).signed else x)
            yield tuple(found)

    def all(self) -> Iterator[Batch]:
        """Every image of the larger set once, in order and unchanged, beside those of the smaller one in turn."""
        a, b = self._sets
        every = torch.arange(max(len(a), len(b)))
        signed = image_traits(self._model).signed
        for part in every.split(self.size):
            yield tuple(images.batch(part % len(images), signed=signed) for images in self._sets)

    def _order(self, images: Images, seed: int, epoch: int) -> torch.Tensor:
        """As many numbers of images as an epoch has samples."""
        rounds = -(-self.samples // len(images))
        return torch.cat([data.epoch_order(len(images), seed, epoch * rounds + k) for k in range(rounds)])


def batch_for(model: nn.Module, images: Images, index: slice | torch.Tensor) -> Batch:
    """Chosen images, and labels if the model has classes, as it wants them and where it is."""
    device, traits = next(model.parameters()).device, image_traits(model)
    x = images.batch(index, signed=traits.signed).to(device)
    return (x, images.labels[index].to(device)) if traits.classes else (x,)
