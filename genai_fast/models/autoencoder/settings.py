"""The convolutional autoencoder: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, ImageConfig, setting


@dataclass(frozen=True)
class AutoencoderConfig(ImageConfig):
    latent: int = setting(128, "dimensions of the code", low=1)


AUTOENCODER = Command(
    "autoencoder",
    "convolutional autoencoder",
    AutoencoderConfig,
    ("genai-fast train autoencoder --data PHOTOS --size 64 --latent 64",),
)

COMMANDS = (AUTOENCODER,)
