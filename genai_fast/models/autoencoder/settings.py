"""The convolutional autoencoder: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, ImageConfig, setting


@dataclass(frozen=True)
class AutoencoderConfig(ImageConfig):
    latent: int = setting(128, "dimensions of the code", low=1)
    noise: float = setting(0.0, "denoising: standard deviation of the noise on a training step's input", low=0)
    masking: float = setting(0.0, "denoising: share of the input's pixels that become black", low=0, high=0.99)


AUTOENCODER = Command(
    "autoencoder",
    "convolutional autoencoder",
    AutoencoderConfig,
    (
        "genai-fast train autoencoder --data PHOTOS --size 64 --latent 64",
        "genai-fast train autoencoder --data mnist --noise 0.5 --masking 0.25 --run denoising",
    ),
)

COMMANDS = (AUTOENCODER,)
