"""The variational recurrent network: recipe."""

from __future__ import annotations

from genai_fast.models.common.recipe import Bench, Graph, Recipe
from genai_fast.models.vrnn import settings
from genai_fast.models.vrnn.model import VRNN
from genai_fast.models.vrnn.plain import PlainVRNN

RECIPES = (
    Recipe(
        settings.VRNN, VRNN, PlainVRNN,
        feed="windows", unrolled=True,
        graph=Graph(
            {"ids": "batch", "phi_z": "batch embedding", "h": "batch hidden", "noise": "batch latent"},
            ("logits", "phi_z_after", "h_after"), "step",
        ),
        benches=(Bench("vrnn", 32, (64,), vocabulary=256),),
    ),
)  # fmt: skip
