"""The encoder-decoder Transformer."""

from genai_fast import imports

__getattr__, __dir__ = imports.on_demand(__name__, {"model": "Memory Seq2Seq Seq2SeqDecoder Seq2SeqLosses"})
