"""The VAE of sounds: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import AudioConfig, Command, changed, setting


@dataclass(frozen=True)
class AudioVAEConfig(AudioConfig):
    batch_size: int = changed(AudioConfig, "batch_size", 64)
    latent: int = setting(32, "dimensions of the latent space", low=1)
    width: int = setting(128, "channels of the first feature map; each further one has twice as many", low=1)
    layers: int = setting(3, "convolutions, each of which halves the length", low=1, high=8)
    hidden: int = setting(0, "units of a dense layer on both sides of the latent; 0: none", low=0)
    kernel: int = setting(3, "frames that a convolution sees, an odd number", low=1)
    norm: bool = setting(True, "batch norm after each convolution")
    beta: float = setting(1.0, "weight of the KL term", low=0)


AUDIO_VAE = Command(
    "audio-vae",
    "convolutional variational autoencoder of sounds",
    AudioVAEConfig,
    (
        "genai-fast train audio-vae --data spoken-digits --epochs 40",
        "genai-fast train audio-vae --data DRUMS --seconds 1.5 --trim 40 --latent 64",
        "genai-fast train audio-vae --data DRUMS.zip --width 32 --layers 2 --hidden 100 --no-norm",
    ),
)

COMMANDS = (AUDIO_VAE,)
