"""Training on two sets of images: the data, its pairs, the model that fits them, what is looked at."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from genai_fast import data
from genai_fast.config import TranslationConfig
from genai_fast.data import DataError, DataWarning, Images
from genai_fast.errors import UsageError
from genai_fast.models.registry import RECIPES
from genai_fast.runs.image_task import ImageTask, digest_of
from genai_fast.runs.translation_evaluation import Sides, TranslationWatch, draw
from genai_fast.training.batches import Feed, TranslationFeed
from genai_fast.training.loop import Look
from genai_fast.training.tensorboard import Board

_NAMED = 3  # pictures without a partner that a message names


class TranslationTask(ImageTask):
    """A recipe that translates, and both sets of its images."""

    def __init__(self, name: str, settings: TranslationConfig, resumed: Path | None = None) -> None:
        for flag, source in (("--data", settings.data), ("--data-b", settings.data_b)):
            if not source:
                raise UsageError(
                    f"{name}: {flag}: expected a set of pictures, got nothing; remedy: --data A --data-b B, each in any"
                    f" form that other recipes for images take"
                )
        self.name, self.settings, self.pairs = name, settings, RECIPES[name].pairs
        sets = [data.load(s, settings.size or None, strict=settings.strict) for s in (settings.data, settings.data_b)]
        digest = "-".join(map(digest_of, sets))
        if any(images.shape[0] == 3 for images in sets):
            sets = [images.in_colour() for images in sets]
        a, b = sets
        if a.shape != b.shape:
            raise UsageError(
                f"{name}: expected both sets of one size, got {settings.data} of {_pixels(a)} and"
                f" {settings.data_b} of {_pixels(b)} pixels; remedy: --size PIXELS"
            )
        if self.pairs:
            a, b = paired(a, b)
        self.images, self.others = a, b
        (self.train, self.validation), (self.train_b, self.validation_b) = (
            images.split(settings.validation, settings.seed) for images in (a, b)
        )
        self.about: dict[str, Any] = {"recipe": name, "shape": list(a.shape), "images": [len(a), len(b)]}
        self.about |= {"classes": [], "data": digest}

    @property
    def described(self) -> str:
        """The data in words."""
        counts = f"{len(self.train):,} and {len(self.train_b):,} images for training"
        held_out = f"{len(self.validation):,} and {len(self.validation_b):,} held out"
        return f"{self.images.name} and {self.others.name}: {counts}, {held_out}"

    def feeds(self, model: nn.Module) -> tuple[Feed, Feed]:
        """For training and for validation."""
        size, most = self.settings.batch_size, max(len(self.train), len(self.train_b))
        if most < size:
            raise UsageError(
                f"{self.settings.data}, {self.settings.data_b}: expected at least {size} images for training, a batch,"
                f" in one of them, got {most}; remedy: more images, or a smaller --batch-size"
            )
        sets = (self.train, self.train_b), (self.validation, self.validation_b)
        return tuple(TranslationFeed(model, *s, self.settings, pairs=self.pairs) for s in sets)

    def watch(self, model: nn.Module, folder: Path, board: Board | None) -> Callable[[int, dict[str, float]], Look]:
        return TranslationWatch(model, self._sides(), self.settings, folder, board)

    def finish(self, model: nn.Module, folder: Path) -> None:
        draw(model, self._sides(), folder / "samples.png")

    def _sides(self) -> Sides:
        train, held_out = {"a": self.train, "b": self.train_b}, {"a": self.validation, "b": self.validation_b}
        return Sides(train, held_out, self.pairs)


def _pixels(images: Images) -> str:
    return f"{images.shape[2]} x {images.shape[1]}"


def paired(a: Images, b: Images) -> tuple[Images, Images]:
    """Both sets in one order, so that images of one number are partners: those whose files have one name, whatever its
    suffix; of sets without names those of one number.

    A partner of a broken picture is left out with a warning.

    Raises DataError: a picture has no partner, or two of one set have the same name.
    """
    if not (a.names and b.names):
        if len(a) != len(b):
            raise DataError(
                f"{a.name}, {b.name}: expected as many images in both, whose numbers make the pairs, got {len(a)} and"
                f" {len(b)}; remedy: the data that belong together"
            )
        return a, b
    of_a, of_b = _stems(a), _stems(b)
    broken = {_stem(name) for images in (a, b) for name in images.skipped}
    alone = [
        [name for name in one if name not in other and name not in broken]
        for one, other in ((of_a, of_b), (of_b, of_a))
    ]
    if any(alone):
        raise DataError(
            f"{a.name}, {b.name}: expected pictures of the same names in both, got {_listed(alone[0])} in the first"
            f" alone and {_listed(alone[1])} in the second; remedy: rename or remove them"
        )
    both = [name for name in of_a if name in of_b]
    if left := len(of_a) + len(of_b) - 2 * len(both):
        message = f"{a.name}, {b.name}: {left} pictures are left out because their partners are broken"
        warnings.warn(message, DataWarning, stacklevel=3)
    return tuple(images.subset(torch.tensor([of[name] for name in both])) for images, of in ((a, of_a), (b, of_b)))


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _stems(images: Images) -> dict[str, int]:
    """Name without suffix -> number of the image."""
    stems = [_stem(name) for name in images.names]
    if len(set(stems)) < len(stems):
        ((name, _),) = Counter(stems).most_common(1)
        raise DataError(
            f"{images.name}: expected one picture of each name, got two of {name}; remedy: rename or remove one"
        )
    return {name: k for k, name in enumerate(stems)}


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = ", ..." if len(names) > _NAMED else ""
    return f"{len(names)} ({', '.join(map(data.printable, names[:_NAMED]))}{more})"
