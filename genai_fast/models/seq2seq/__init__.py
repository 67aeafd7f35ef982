"""The encoder-decoder Transformer."""

from genai_fast.models.seq2seq.model import Memory, Seq2Seq, Seq2SeqDecoder, Seq2SeqLosses  # noqa: F401
