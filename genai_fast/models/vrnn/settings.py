"""The variational recurrent network: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, TextConfig, changed, setting


@dataclass(frozen=True)
class VRNNConfig(TextConfig):
    embedding: int = setting(64, "width of a token's embedding", low=1)
    hidden: int = setting(256, "width of the recurrent state", low=1)
    latent: int = setting(32, "dimensions of each step's latent", low=1)
    beta: float = setting(1.0, "weight of the KL term", low=0)
    batch_size: int = changed(TextConfig, "batch_size", 32)
    block: int = changed(TextConfig, "block", 64)


VRNN = Command(
    "vrnn",
    "variational recurrent network over text",
    VRNNConfig,
    ("genai-fast train vrnn --data BOOK.txt --tokenizer char --block 64",),
)

COMMANDS = (VRNN,)
