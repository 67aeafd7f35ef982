"""The convolutional autoencoder: settings and recipe."""

from dataclasses import dataclass

from genai_fast.config import ImageConfig, setting
from genai_fast.models.autoencoder.model import Autoencoder
from genai_fast.models.autoencoder.plain import PlainAutoencoder
from genai_fast.models.common.conv import widths_of
from genai_fast.models.common.recipe import Recipe, channels_last


@dataclass(frozen=True)
class AutoencoderConfig(ImageConfig):
    latent: int = setting(128, "dimensions of the code", low=1)


RECIPES = (
    Recipe(
        "autoencoder", "convolutional autoencoder", AutoencoderConfig, Autoencoder, PlainAutoencoder,
        build=channels_last(Autoencoder), derived=widths_of("Autoencoder"),
        examples=("genai-fast train autoencoder --data PHOTOS --size 64 --latent 64",),
    ),
)  # fmt: skip
