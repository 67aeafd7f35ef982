"""Text: real files in, ids out."""

from genai_fast.data.text.clean import clean
from genai_fast.data.text.corpus import Corpus, PairCorpus
from genai_fast.data.text.feeds import Feed, Pairs, Sequences, Streams, Windows
from genai_fast.data.text.packed import Tokens, pack, pack_pairs
from genai_fast.data.text.pairs import continuations, load_pairs
from genai_fast.data.text.sources import load
from genai_fast.data.text.tokenizers import Tokenizer, make_tokenizer, read_tokenizer

__all__ = [
    "Corpus",
    "Feed",
    "PairCorpus",
    "Pairs",
    "Sequences",
    "Streams",
    "Tokenizer",
    "Tokens",
    "Windows",
    "clean",
    "continuations",
    "load",
    "load_pairs",
    "make_tokenizer",
    "pack",
    "pack_pairs",
    "read_tokenizer",
]
