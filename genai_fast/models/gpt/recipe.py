"""GPT: recipe."""

from __future__ import annotations

from genai_fast.models.common.recipe import Bench, Graph, Recipe
from genai_fast.models.gpt import pretrained, settings
from genai_fast.models.gpt.model import GPT
from genai_fast.models.gpt.plain import PlainGPT

_PLAIN = {"dropout": 0.0, "weight_decay": 0.0, "beta2": 0.999}
_GPT2 = {**_PLAIN, "precision": "bfloat16", "block": 1024, "layers": 12, "heads": 12, "width": 768}

RECIPES = (
    Recipe(
        settings.GPT, GPT, PlainGPT,
        feed="windows", pretrained=pretrained, graph=Graph({"ids": "batch tokens"}, ("logits",)),
        benches=(
            Bench("gpt_nano", 16, (256,), _PLAIN),
            Bench("gpt_nano_bfloat16", 16, (256,), {**_PLAIN, "precision": "bfloat16"}, tolerance=0.05),
            Bench("gpt2_bfloat16", 8, (1024,), _GPT2, vocabulary=50257, tolerance=0.05, gpu=True),
        ),
    ),
)  # fmt: skip
