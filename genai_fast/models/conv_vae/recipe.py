"""Convolutional VAEs: settings and recipes."""

from dataclasses import dataclass

from genai_fast.config import ImageConfig, setting
from genai_fast.models.common.conv import widths_of
from genai_fast.models.common.recipe import Bench, Recipe, channels_last
from genai_fast.models.conv_vae.model import ConditionalVAE, ConvVAE
from genai_fast.models.conv_vae.plain import PlainConditionalVAE, PlainConvVAE


@dataclass(frozen=True)
class ConvVAEConfig(ImageConfig):
    latent: int = setting(128, "dimensions of the latent space", low=1)
    beta: float = setting(1.0, "weight of the KL term", low=0)


RECIPES = (
    Recipe(
        "conv-vae", "convolutional variational autoencoder", ConvVAEConfig, ConvVAE, PlainConvVAE,
        build=channels_last(ConvVAE), derived=widths_of("ConvVAE"), benches=(Bench("conv_vae_64", 64, (3, 64, 64)),),
        examples=(
            "genai-fast train conv-vae --data PAINTINGS --size 128 --beta 4",
            "genai-fast train conv-vae --data PHOTOS.zip --size 64 --flip 0.5 --precision bfloat16",
        ),
    ),
    Recipe(
        "cvae", "conditional variational autoencoder, for labelled images", ConvVAEConfig, ConditionalVAE,
        PlainConditionalVAE, build=channels_last(ConditionalVAE), derived=widths_of("ConditionalVAE"), labelled=True,
        examples=("genai-fast train cvae --data mnist --latent 16 --epochs 20",),
    ),
)  # fmt: skip
