"""The VAE of one hidden layer: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, ImageConfig, changed, setting


@dataclass(frozen=True)
class VAEConfig(ImageConfig):
    hidden: int = setting(400, "width of the hidden layers", low=1)
    widths: str = setting("", "widths of several hidden layers of the encoder in place of --hidden, such as 16,8")
    decoder_widths: str = setting("", "the decoder's; none: no hidden layer; default: the encoder's in reverse")
    latent: int = setting(20, "dimensions of the latent space", low=1)
    beta: float = setting(1.0, "weight of the KL term", low=0)
    likelihood: str = setting("bernoulli", "likelihood of a pixel", choices=("bernoulli", "gaussian"))
    optimizer: str = setting("adam", "optimizer; rmsprop: as Keras has it", choices=("adam", "rmsprop"))
    grid_every: int = changed(ImageConfig, "grid_every", 0)  # its epochs take less time than a grid
    quality_every: int = changed(ImageConfig, "quality_every", 0)


VAE = Command(
    "vae",
    "variational autoencoder of one hidden layer",
    VAEConfig,
    (
        "genai-fast train vae --data mnist --epochs 20",
        "genai-fast train vae --data mnist --latent 2 --run plane",
        "genai-fast train vae --widths 16,8 --decoder-widths none --latent 2 --optimizer rmsprop",
    ),
)

COMMANDS = (VAE,)
