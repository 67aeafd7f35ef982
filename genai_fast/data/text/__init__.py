"""Text: real files in, ids out.

    train, held_out = text.load("pydoc").split(0.1, seed=0)
    tokenizer = text.make_tokenizer("bpe", train.documents, 2048)
    feed = text.Windows(text.pack(train.documents, tokenizer), block=256, size=32, seed=0)
    for x, y in feed.epoch(0): ...                     # [32, 256] int64 each
    validation = text.Windows(text.pack(held_out.documents, tokenizer), block=256, size=32)
    for x, y in validation.all(): ...                  # each token of what was held out is a target once

`Sequences` wants short documents: split, then take `passages()` of each part. `load_pairs` and `Pairs` are the same for
pairs.
"""

from genai_fast.data.text.cleaning import clean
from genai_fast.data.text.corpus import Corpus, PairCorpus
from genai_fast.data.text.feeds import Feed, Pairs, Sequences, Streams, Windows
from genai_fast.data.text.packed import Tokens, pack, pack_pairs
from genai_fast.data.text.pairs import continuations, load_pairs
from genai_fast.data.text.sources import PYDOC, PYDOC_0_1, load
from genai_fast.data.text.tokenizers import Tokenizer, make_tokenizer, read_tokenizer

__all__ = [
    "PYDOC", "PYDOC_0_1", "Corpus", "Feed", "PairCorpus", "Pairs", "Sequences", "Streams", "Tokenizer", "Tokens",
    "Windows", "clean", "continuations", "load", "load_pairs", "make_tokenizer", "pack", "pack_pairs", "read_tokenizer",
]  # fmt: skip
