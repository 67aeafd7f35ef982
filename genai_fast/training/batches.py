"""What training is fed with: batches in an order that a resumed run finds again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import nn

from genai_fast import data
from genai_fast.config import ImageConfig
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
    """Images as a model wants them.

    It says so by `signed` (in [-1, 1] rather than [0, 1]), `classes` (labels too) and `n_critic` (so many batches a
    step); with `turns` it gets whole batches only.
    """

    names = ("images", "labels")
    rows: Callable[[int], torch.Tensor] | None = None

    def __init__(self, model: nn.Module, images: Images, config: ImageConfig) -> None:
        self._images, self._config, self._model = images, config, model
        self.size = config.batch_size * getattr(model, "n_critic", 1)
        self._whole = hasattr(model, "turns")
        self.steps = len(images) // self.size if self._whole else math.ceil(len(images) / self.size)
        self.samples = self.steps * self.size if self._whole else len(images)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        config = self._config
        return data.batches(
            self._images, self.size, config.seed, epoch, start, signed=getattr(self._model, "signed", False),
            labels=bool(getattr(self._model, "classes", 0)), whole=self._whole,
            augment=Augment(config.flip, config.crop, config.rotate, config.jitter), rows=self.rows,
        )  # fmt: skip

    def all(self) -> Iterator[Batch]:
        size = self._config.batch_size
        for first in range(0, len(self._images), size):
            yield batch_for(self._model, self._images, slice(first, first + size))


def batch_for(model: nn.Module, images: Images, index: slice | torch.Tensor) -> Batch:
    """Chosen images, and labels if the model has classes, as it wants them and where it is."""
    device = next(model.parameters()).device
    x = images.batch(index, signed=getattr(model, "signed", False)).to(device)
    return (x, images.labels[index].to(device)) if getattr(model, "classes", 0) else (x,)
