"""WaveNet: recipe."""

from __future__ import annotations

from genai_fast.models.common.recipe import Bench, Recipe, Values
from genai_fast.models.wavenet import settings
from genai_fast.models.wavenet.model import WaveNet
from genai_fast.models.wavenet.plain import PlainWaveNet


def _derived(values: Values) -> Values:
    return {"classes": values["classes"] if values["conditional"] else 0}


RECIPES = (
    Recipe(
        settings.WAVENET, WaveNet, PlainWaveNet,
        derived=_derived,
        benches=(
            Bench("wavenet", 4, (2048,)),
            Bench("wavenet_small", 4, (2048,), {"width": 32, "skip": 64, "layers": 8, "cycles": 1}),
        ),
    ),
)  # fmt: skip
