"""The encoder-decoder Transformer: recipe."""

from __future__ import annotations

from genai_fast.models.common.recipe import Bench, Graph, Recipe
from genai_fast.models.seq2seq import settings
from genai_fast.models.seq2seq.model import Seq2Seq
from genai_fast.models.seq2seq.plain import PlainSeq2Seq

RECIPES = (
    Recipe(
        settings.SEQ2SEQ,
        Seq2Seq,
        PlainSeq2Seq,
        feed="pairs",
        graph=Graph({"source": "batch source_tokens", "source_lengths": "batch", "ids": "batch tokens"}, ("logits",)),
        benches=(Bench("seq2seq", 32, (64,), {"dropout": 0.0, "block": 64}, vocabulary=4096),),
    ),
)
