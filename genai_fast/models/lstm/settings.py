"""The LSTM language model: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, TextConfig, changed, setting


@dataclass(frozen=True)
class LSTMConfig(TextConfig):
    embedding: int = setting(128, "width of a token's embedding", low=1)
    hidden: int = setting(256, "width of the LSTM's state", low=1)
    layers: int = setting(2, "LSTM layers", low=1)
    dropout: float = setting(0.0, "dropout probability between layers", low=0, high=0.9)
    block: int = changed(TextConfig, "block", 128)
    batch_size: int = changed(TextConfig, "batch_size", 32)


LSTM = Command(
    "lstm", "LSTM language model", LSTMConfig, ("genai-fast train lstm --data REVIEWS.jsonl --tokenizer char",)
)

COMMANDS = (LSTM,)
