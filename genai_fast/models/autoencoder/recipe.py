"""The convolutional autoencoder: recipe."""

from __future__ import annotations

from genai_fast.models.autoencoder import settings
from genai_fast.models.autoencoder.model import Autoencoder
from genai_fast.models.autoencoder.plain import PlainAutoencoder
from genai_fast.models.common.conv import widths_of
from genai_fast.models.common.recipe import Bench, Recipe, channels_last

RECIPES = (
    Recipe(
        settings.AUTOENCODER, Autoencoder, PlainAutoencoder,
        build=channels_last(Autoencoder), derived=widths_of("Autoencoder"), draws=False,
        benches=(Bench("autoencoder_64", 64, (3, 64, 64)),),
    ),
)  # fmt: skip
