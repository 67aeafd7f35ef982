"""The VAE of sentences: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, TextConfig, changed, setting


@dataclass(frozen=True)
class TextVAEConfig(TextConfig):
    """Annealing and word dropout: Bowman et al. 2015."""

    embedding: int = setting(128, "width of a token's embedding", low=1)
    hidden: int = setting(256, "width of the recurrent states", low=1)
    latent: int = setting(32, "dimensions of the latent space", low=1)
    beta: float = setting(1.0, "weight of the KL term", low=0)
    annealing: int = setting(1000, "steps over which the KL weight rises from 0", low=0)
    word_dropout: float = setting(0.25, "probability of dropping an input token of the decoder", low=0, high=1)
    batch_size: int = changed(TextConfig, "batch_size", 32)
    block: int = changed(TextConfig, "block", 64)


TEXT_VAE = Command(
    "text-vae",
    "variational autoencoder of sentences",
    TextVAEConfig,
    ("genai-fast train text-vae --data SENTENCES.txt --annealing 2000 --word-dropout 0.3",),
)

COMMANDS = (TEXT_VAE,)
