"""The LSTM language model: recipe."""

from __future__ import annotations

from genai_fast.models.common.recipe import Bench, Graph, Recipe
from genai_fast.models.lstm import settings
from genai_fast.models.lstm.model import LSTMLanguageModel
from genai_fast.models.lstm.plain import PlainLSTMLanguageModel

RECIPES = (
    Recipe(
        settings.LSTM, LSTMLanguageModel, PlainLSTMLanguageModel,
        feed="streams", unrolled=True,
        graph=Graph(
            {"ids": "batch", "h": "layers batch hidden", "c": "layers batch hidden"},
            ("logits", "h_after", "c_after"), "step",
        ),
        benches=(Bench("lstm", 32, (128,), vocabulary=8192),),
    ),
)  # fmt: skip
