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
            labels=bool(traits.classes), whole=self._whole,
            augment=Augment(config.flip, config.crop, config.rotate, config.jitter), rows=self.rows,
        )  # fmt: skip

    def all(self) -> Iterator[Batch]:
        size = self._config.batch_size
        for first in range(0, len(self._images), size):
            yield batch_for(self._model, self._images, slice(first, first + size))


def batch_for(model: nn.Module, images: Images, index: slice | torch.Tensor) -> Batch:
    """Chosen images, and labels if the model has classes, as it wants them and where it is."""
    device, traits = next(model.parameters()).device, image_traits(model)
    x = images.batch(index, signed=traits.signed).to(device)
    return (x, images.labels[index].to(device)) if traits.classes else (x,)
