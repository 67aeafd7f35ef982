"""The VAE of one hidden layer: recipe."""

from __future__ import annotations

from genai_fast.models.common.recipe import Bench, Recipe
from genai_fast.models.vae import settings
from genai_fast.models.vae.model import MLPVAE
from genai_fast.models.vae.plain import PlainMLPVAE

RECIPES = (
    Recipe(
        settings.VAE, MLPVAE, PlainMLPVAE, square=False, summed=True,
        benches=(Bench("mlp_vae", 128, (1, 28, 28)),),
    ),
)  # fmt: skip
