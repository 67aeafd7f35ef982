"""Training on images: the data, the model that fits them, what is looked at, and the pictures at the end."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genai_fast import data
from genai_fast.config import ImageConfig
from genai_fast.contract import image_traits
from genai_fast.data import Images
from genai_fast.errors import UsageError
from genai_fast.models.registry import RECIPES, make
from genai_fast.runs.image_evaluation import Watch, draw
from genai_fast.training.batches import Feed, ImageFeed
from genai_fast.training.tensorboard import Board

_AT_ONCE = 1000  # images whose digest is taken at a time


class ImageTask:
    """A recipe for images and its data."""

    packages = ("PIL.Image",)

    def __init__(self, name: str, settings: ImageConfig, resumed: Path | None = None) -> None:
        images = data.load(settings.data, settings.size or None, strict=settings.strict)
        self.name, self.settings, self.images = name, settings, images
        self.train, self.validation = images.split(settings.validation, settings.seed)
        self.about: dict[str, Any] = {"recipe": name, "shape": list(images.shape), "images": len(images)}
        self.about |= {"classes": list(images.classes) if RECIPES[name].takes_labels else [], "data": digest_of(images)}

    @property
    def described(self) -> str:
        """The data in words."""
        return f"{self.images.name}: {len(self.train):,} images for training, {len(self.validation):,} held out"

    def model(self) -> nn.Module:
        return make(self.name, self.settings, self.images.shape, len(self.images.classes))

    def feeds(self, model: nn.Module) -> tuple[Feed, Feed]:
        """For training and for validation."""
        train = ImageFeed(model, self.train, self.settings)
        if not train.steps:
            size = self.settings.batch_size * image_traits(model).n_critic
            raise UsageError(
                f"{self.settings.data}: expected at least {size} images for training, a batch, got {len(self.train)}"
                f" besides {len(self.validation)} held out; remedy: more images, or a smaller --batch-size"
            )
        return train, ImageFeed(model, self.validation, self.settings)

    def prepare(self, folder: Path) -> None:
        """What a run's folder holds besides: nothing."""

    def watch(self, model: nn.Module, folder: Path, board: Board | None) -> Watch:
        return Watch(model, self.train, self.validation, self.settings, folder, board)

    def finish(self, model: nn.Module, folder: Path) -> None:
        draw(model, self.train, self.validation, folder)

    @staticmethod
    def open(name: str, settings: ImageConfig, about: dict[str, Any], folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        """A run's model, without its weights, and what else `Opened` says of it."""
        shape, classes = tuple(about["shape"]), tuple(about["classes"])
        if len(shape) != 3 or not all(type(x) is int and 0 < x < 1 << 20 for x in shape):
            raise UsageError(f"{folder}: expected images of (C, H, W) pixels in its checkpoint, got {list(shape)}")
        return make(name, settings, shape, len(classes)), {"shape": shape, "classes": classes}


def digest_of(images: Images) -> str:
    """16 hexadecimal digits of pixels and labels."""
    digest = hashlib.sha256()
    index = torch.arange(len(images)) if images.index is None else images.index
    for rows in index.split(_AT_ONCE):
        digest.update(images.stored[rows].numpy())
    if images.labels is not None:
        digest.update(images.labels.contiguous().numpy())
    return digest.hexdigest()[:16]
