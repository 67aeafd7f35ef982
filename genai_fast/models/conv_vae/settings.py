"""Convolutional VAEs: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, ImageConfig, setting


@dataclass(frozen=True)
class ConvVAEConfig(ImageConfig):
    latent: int = setting(128, "dimensions of the latent space", low=1)
    beta: float = setting(1.0, "weight of the KL term", low=0)


CONV_VAE = Command(
    "conv-vae",
    "convolutional variational autoencoder",
    ConvVAEConfig,
    (
        "genai-fast train conv-vae --data PAINTINGS --size 128 --beta 4",
        "genai-fast train conv-vae --data PHOTOS.zip --size 64 --flip 0.5 --precision bfloat16",
    ),
)
CVAE = Command(
    "cvae",
    "conditional variational autoencoder, for labelled images",
    ConvVAEConfig,
    ("genai-fast train cvae --data mnist --latent 16 --epochs 20",),
)

COMMANDS = (CONV_VAE, CVAE)
