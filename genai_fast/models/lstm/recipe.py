"""The LSTM language model: settings and recipe."""

from dataclasses import dataclass

from genai_fast.config import TextConfig, changed, setting
from genai_fast.models.common.recipe import Bench, Graph, Recipe
from genai_fast.models.lstm.model import LSTMLanguageModel
from genai_fast.models.lstm.plain import PlainLSTMLanguageModel


@dataclass(frozen=True)
class LSTMConfig(TextConfig):
    embedding: int = setting(128, "width of a token's embedding", low=1)
    hidden: int = setting(256, "width of the LSTM's state", low=1)
    layers: int = setting(2, "LSTM layers", low=1)
    dropout: float = setting(0.0, "dropout probability between layers", low=0, high=0.9)
    block: int = changed(TextConfig, "block", 128)
    batch_size: int = changed(TextConfig, "batch_size", 32)


RECIPES = (
    Recipe(
        "lstm", "LSTM language model", LSTMConfig, LSTMLanguageModel, PlainLSTMLanguageModel,
        feed="streams", unrolled=True,
        graph=Graph(
            {"ids": "batch", "h": "layers batch hidden", "c": "layers batch hidden"},
            ("logits", "h_after", "c_after"), "step",
        ),
        benches=(Bench("lstm", 32, (128,), vocabulary=8192),),
        examples=("genai-fast train lstm --data REVIEWS.jsonl --tokenizer char",),
    ),
)  # fmt: skip
