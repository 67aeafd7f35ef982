"""Convolutional VAEs: recipes."""

from __future__ import annotations

from genai_fast.models.common.conv import widths_of
from genai_fast.models.common.recipe import Bench, Recipe, channels_last
from genai_fast.models.conv_vae import settings
from genai_fast.models.conv_vae.model import ConditionalVAE, ConvVAE
from genai_fast.models.conv_vae.plain import PlainConditionalVAE, PlainConvVAE

RECIPES = (
    Recipe(
        settings.CONV_VAE, ConvVAE, PlainConvVAE,
        build=channels_last(ConvVAE), derived=widths_of("ConvVAE"), benches=(Bench("conv_vae_64", 64, (3, 64, 64)),),
    ),
    Recipe(
        settings.CVAE, ConditionalVAE,
        PlainConditionalVAE, build=channels_last(ConditionalVAE), derived=widths_of("ConditionalVAE"), labelled=True,
        benches=(Bench("cvae_64", 64, (3, 64, 64)),),
    ),
)  # fmt: skip
