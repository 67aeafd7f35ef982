"""RECIPES: every model that `genai-fast train` knows. models/commands.py names the families."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn

from genai_fast import models
from genai_fast.config import Config
from genai_fast.errors import UsageError
from genai_fast.models.commands import FAMILIES
from genai_fast.models.common.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for family in FAMILIES
    for recipe in importlib.import_module(f"genai_fast.models.{family}.recipe").RECIPES
}

# Networks that `genai-fast tune` knows: name -> what makes one, and the shape of one input without the batch.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"dcgan-{s}-generator": (lambda s=s: models.DCGANGenerator(s), (100,)) for s in (32, 64, 128)},
    **{f"dcgan-{s}-discriminator": (lambda s=s: models.DCGANDiscriminator(s), (3, s, s)) for s in (32, 64, 128)},
    "dcgan-28-generator": (lambda: models.DCGANGenerator(28, channels=1), (100,)),
    "dcgan-28-discriminator": (lambda: models.DCGANDiscriminator(28, channels=1), (1, 28, 28)),
    "wgan-gp-64-critic": (lambda: models.DCGANDiscriminator(64, norm="instance"), (3, 64, 64)),
    "dense-generator": (models.DenseGenerator, (100,)),
    "dense-generator-k4": (models.DenseGeneratorK4, (100,)),
    "dense-discriminator": (models.DenseDiscriminator, (1, 28, 28)),
    "mlp-generator": (models.MLPGenerator, (100,)),
    "mlp-discriminator": (models.MLPDiscriminator, (1, 28, 28)),
    **{f"conv-vae-{s}": (lambda s=s: models.ConvVAE(s), (3, s, s)) for s in (64, 128, 256)},
    "conv-vae-28": (lambda: models.ConvVAE(28, channels=1), (1, 28, 28)),
    **{f"autoencoder-{s}": (lambda s=s: models.Autoencoder(s), (3, s, s)) for s in (64, 128, 256)},
    "autoencoder-28": (lambda: models.Autoencoder(28, channels=1), (1, 28, 28)),
}


def make(name: str, config: Config, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The model of recipe `name` for images of shape (C, H, W), sounds of (mels, frames), or windows of (samples,).

    Raises UsageError: the settings and the data do not go together.
    """
    recipe = RECIPES[name]
    if recipe.labelled and classes < 1:
        raise UsageError(
            f"{name}: expected images with labels, got none; remedy: a folder with one subfolder for each class, or"
            f" labels next to the images"
        )
    try:
        return recipe.make(config, shape, classes)
    except ValueError as error:
        hint = "" if recipe.sounds or recipe.waves else "; the images' size is set by --size"
        raise UsageError(f"{name}: {error}{hint}") from error
