"""The VAE of sentences: recipe."""

from __future__ import annotations

from genai_fast.models.common.recipe import Bench, Graph, Recipe
from genai_fast.models.text_vae import settings
from genai_fast.models.text_vae.model import TextVAE
from genai_fast.models.text_vae.plain import PlainTextVAE

RECIPES = (
    Recipe(
        settings.TEXT_VAE, TextVAE, PlainTextVAE,
        feed="sequences", unrolled=True,
        graph=Graph({"z": "batch latent", "ids": "batch", "h": "batch hidden"}, ("logits", "h_after"), "step"),
        benches=(Bench("text_vae", 32, (64,), {"annealing": 0, "word_dropout": 0.0}, vocabulary=4096),),
    ),
)  # fmt: skip
