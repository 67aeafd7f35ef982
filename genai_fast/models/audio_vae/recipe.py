"""The VAE of sounds: recipe."""

from __future__ import annotations

from genai_fast.models.audio_vae import settings
from genai_fast.models.audio_vae.model import AudioVAE
from genai_fast.models.audio_vae.plain import PlainAudioVAE
from genai_fast.models.common.recipe import Bench, Graph, Recipe, Values


def _derived(values: Values) -> Values:
    return {"widths": tuple(values["width"] << k for k in range(values["layers"]))}


RECIPES = (
    Recipe(
        settings.AUDIO_VAE, AudioVAE, PlainAudioVAE,
        derived=_derived, graph=Graph({"z": "batch latent"}, ("log_mel",), "decode"),
        benches=(
            Bench("audio_vae", 64, (128, 32)),
            Bench("audio_vae_keras", 64, (128, 32), {"width": 32, "layers": 2, "hidden": 100, "norm": False}),
        ),
    ),
)  # fmt: skip
