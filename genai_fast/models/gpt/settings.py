"""GPT: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, TextConfig, changed, setting


@dataclass(frozen=True)
class GPTConfig(TextConfig):
    """Rates and decay: Brown et al. 2020."""

    layers: int = setting(6, "Transformer blocks", low=1)
    heads: int = setting(6, "attention heads", low=1)
    width: int = setting(384, "width of the hidden state", low=1)
    dropout: float = setting(0.1, "dropout probability", low=0, high=0.9)
    shard: bool = setting(False, "shard weights, gradients and optimizer state across processes (FSDP2)")
    batch_size: int = changed(TextConfig, "batch_size", 16)
    epochs: int = changed(TextConfig, "epochs", 10)
    beta2: float = changed(TextConfig, "beta2", 0.95)
    weight_decay: float = changed(TextConfig, "weight_decay", 0.1)
    warmup: int = changed(TextConfig, "warmup", 100)
    decay: str = changed(TextConfig, "decay", "cosine")


GPT = Command(
    "gpt",
    "decoder-only Transformer that writes text",
    GPTConfig,
    (
        "genai-fast train gpt --data BOOK.txt --layers 6 --width 384 --block 256",
        "genai-fast train gpt --data LETTERS --init gpt-BOOK --lr 1e-4 --epochs 3",
        "genai-fast train gpt --data LETTERS --init GPT2-FOLDER --lr 5e-5 --epochs 3",
    ),
)

COMMANDS = (GPT,)
