"""The encoder-decoder Transformer: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, TextConfig, changed, setting


@dataclass(frozen=True)
class Seq2SeqConfig(TextConfig):
    data: str = setting(
        "pydoc", "pairs: .po catalogues, .tsv, .jsonl (source, target), a folder; or text as for gpt, to pre-train on"
    )
    layers: int = setting(4, "Transformer blocks in encoder and decoder each", low=1)
    heads: int = setting(4, "attention heads", low=1)
    width: int = setting(256, "width of the hidden state", low=1)
    dropout: float = setting(0.1, "dropout probability", low=0, high=0.9)
    batch_size: int = changed(TextConfig, "batch_size", 32)
    block: int = changed(TextConfig, "block", 128)
    warmup: int = changed(TextConfig, "warmup", 100)


SEQ2SEQ = Command(
    "seq2seq",
    "encoder-decoder Transformer: text in, text out",
    Seq2SeqConfig,
    (
        "genai-fast train seq2seq --data CATALOGUES --tokenizer bpe --vocabulary 4096",
        "genai-fast train seq2seq --data PAIRS.tsv --init seq2seq-TEXT",
    ),
)

COMMANDS = (SEQ2SEQ,)
