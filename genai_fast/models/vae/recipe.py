"""The VAE of one hidden layer: recipe."""

from __future__ import annotations

from genai_fast.errors import UsageError
from genai_fast.models.common.recipe import Bench, Recipe, Values
from genai_fast.models.vae import settings
from genai_fast.models.vae.model import MLPVAE
from genai_fast.models.vae.plain import PlainMLPVAE


def _widths(flag: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UsageError(f"--{flag}: expected whole numbers from 1, such as 16,8, got {text}")
    return tuple(map(int, parts))


def _derived(values: Values) -> Values:
    hidden, back = values["widths"], values["decoder_widths"]
    return {
        "hidden": _widths("widths", hidden) if hidden else values["hidden"],
        "decoder_hidden": () if back == "none" else _widths("decoder-widths", back) if back else None,
    }


RECIPES = (
    Recipe(
        settings.VAE, MLPVAE, PlainMLPVAE, square=False, summed=True, derived=_derived,
        benches=(Bench("mlp_vae", 128, (1, 28, 28)),),
    ),
)  # fmt: skip
