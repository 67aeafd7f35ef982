"""Llama: recipe."""

from __future__ import annotations

from genai_fast.models.common.recipe import Bench, Graph, Recipe
from genai_fast.models.llama import pretrained, settings
from genai_fast.models.llama.model import Llama
from genai_fast.models.llama.plain import PlainLlama

_PLAIN = {"weight_decay": 0.0, "beta2": 0.999}
_LARGE = {
    **_PLAIN, "precision": "bfloat16", "block": 1024, "layers": 12, "heads": 12, "kv_heads": 4, "width": 768,
}  # fmt: skip

RECIPES = (
    Recipe(
        settings.LLAMA, Llama, PlainLlama,
        feed="windows", pretrained=pretrained, graph=Graph({"ids": "batch tokens"}, ("logits",)),
        benches=(
            Bench("llama_nano", 16, (256,), _PLAIN),
            Bench("llama_bfloat16", 8, (1024,), _LARGE, vocabulary=32000, tolerance=0.05, gpu=True),
        ),
    ),
)  # fmt: skip
