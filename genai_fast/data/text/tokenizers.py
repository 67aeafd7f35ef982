"""Text to numbers and back: bytes, characters, or byte pairs that were trained; each is one JSON file."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from genai_fast.data.errors import DataError, brief, listed
from genai_fast.data.reading import parsing, read_bytes
from genai_fast.data.text import gpt2_tokenizer
from genai_fast.data.text.cleaning import scalars
from genai_fast.data.text.hugging_face_tokenizer import HuggingFaceTokenizer
from genai_fast.data.text.tokenizer import FORM, VERSION, Tokenizer, byte_alphabet
from genai_fast.errors import require

KINDS = ("byte", "char", "bpe")
_FILE = "tokenizer.json"
_UNKNOWN = "\ufffd"
_CODE_POINTS = 0x110000
_VOCABULARY = 4096  # of bpe unless told
_PIECE = 1 << 16  # characters that are encoded at once
_AT_ONCE = 1 << 20  # characters in a call of the trained encoder, which works in threads
_CUT = re.compile(r"(?<=\S)\n(?=\S)")  # GPT-2's pattern ends a part here, whatever stands around it


class ByteTokenizer(Tokenizer):
    """UTF-8: ids 0 to 255 are the bytes, 256 is the end. Every text has its own ids."""

    kind, size, end = "byte", 257, 256
    _table = tuple(bytes([value]) for value in range(256))

    def arrays(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        for text in texts:
            yield np.frombuffer(scalars(text).encode(), np.uint8)

    def _contents(self) -> dict[str, Any]:
        return {}


class CharTokenizer(Tokenizer):
    """Characters, in the order of their code points, then one id for all others, then the end."""

    kind = "char"

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.unknown, self.end = len(characters), len(characters) + 1
        self.size = len(characters) + 2
        self._table = [character.encode() for character in (*characters, _UNKNOWN)]
        self._ids = np.full(_CODE_POINTS, self.unknown, np.int32)
        self._ids[_code_points(characters)] = np.arange(len(characters))

    def arrays(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        for text in texts:
            yield self._ids[_code_points(scalars(text))]

    def _contents(self) -> dict[str, Any]:
        return {"characters": self.characters}


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


class BPETokenizer(Tokenizer):
    """Byte-level byte pair encoding (Sennrich et al. 2016; Radford et al. 2019). Every text has its own ids.

    Text is cut into words, numbers and runs of other characters as GPT-2's is; pairs of neighbours within a part are
    merged in the order in which the merges were found. Encoding needs package tokenizers, decoding does not.

    Args:
        tokens: what each id stands for, in GPT-2's alphabet of 256 printable characters, one a byte.
        merges: the pairs, the most frequent first.
    """

    kind = "bpe"

    def __init__(self, tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> None:
        self.tokens, self.merges = tuple(tokens), tuple(map(tuple, merges))
        self.end, self.size = len(self.tokens), len(self.tokens) + 1
        values = {character: value for value, character in enumerate(byte_alphabet())}
        self._table = [bytes(values[character] for character in token) for token in self.tokens]

    @functools.cached_property
    def _trained(self) -> Any:
        package = require("tokenizers", "text")
        model = package.models.BPE({token: k for k, token in enumerate(self.tokens)}, list(self.merges))
        return _by_words(package, model)

    def arrays(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        parts: list[np.ndarray] = []
        for pieces in _batches((piece, last) for text in texts for piece, last in _pieces(scalars(text))):
            encoded = self._trained.encode_batch_fast([piece for piece, _ in pieces])
            for (_, last), encoding in zip(pieces, encoded, strict=True):
                parts.append(np.array(encoding.ids, np.int32))
                if last:
                    yield parts[0] if len(parts) == 1 else np.concatenate(parts)
                    parts = []

    def _contents(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "merges": self.merges}


def _by_words(package: ModuleType, model: Any) -> Any:
    """An encoder of bytes within GPT-2's parts of a text; it knows no special tokens."""
    encoder = package.Tokenizer(model)
    encoder.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return encoder


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is the last): a long text in pieces that have, one after the other, the ids of the whole."""
    start = 0
    while len(text) - start > _PIECE and (found := _CUT.search(text, start + _PIECE)):
        yield text[start : found.end()], False
        start = found.end()
    yield text[start:], True


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of about _AT_ONCE characters together."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0]) + 1
        if characters >= _AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def make_tokenizer(kind: str, documents: Sequence[str], size: int | None = None) -> Tokenizer:
    """A tokenizer for such text; make it from the training part alone.

    Args:
        kind: "byte"; "char", the characters of the documents; "bpe", byte pairs trained on them (package tokenizers).
        documents: the text; "byte" does not look at it.
        size: ids at most. "char" keeps the most frequent characters (None: all); "bpe" makes as many as there are pairs
            that occur twice (None: 4,096; at least 257); "byte" always has 257.

    Raises DataError: another kind, no text, or too few ids; a UsageError if the package is missing.
    """
    if kind not in KINDS:
        raise DataError(f"tokenizer: expected {', '.join(KINDS[:-1])} or {KINDS[-1]}, got {kind!r}")
    if kind == "byte":
        return ByteTokenizer()
    least = 3 if kind == "char" else 257
    if size is not None and size < least:
        raise DataError(f"tokenizer: expected at least {least} ids for {kind}, got {size}; remedy: a larger size")
    if not any(documents):
        raise DataError(f"tokenizer: expected text to make the {kind} tokenizer from, got none")
    if kind == "char":
        return _characters(documents, size)
    return _train(documents, _VOCABULARY if size is None else size)


def _characters(documents: Sequence[str], size: int | None) -> CharTokenizer:
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(scalars(document))
    counts.pop(_UNKNOWN, None)  # it has the unknown's id
    often = sorted(counts, key=lambda character: (-counts[character], character))
    return CharTokenizer("".join(sorted(often if size is None else often[: size - 2])))


def _train(documents: Sequence[str], size: int) -> BPETokenizer:
    package = require("tokenizers", "text")
    encoder = _by_words(package, package.models.BPE())
    how = {"min_frequency": 2, "show_progress": False, "special_tokens": []}
    trainer = package.trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=list(byte_alphabet()), **how)
    pieces = (piece for document in documents for piece, _ in _pieces(scalars(document)))
    encoder.train_from_iterator(pieces, trainer)
    vocabulary = encoder.get_vocab()
    merges = json.loads(encoder.to_str())["model"]["merges"]
    return BPETokenizer(sorted(vocabulary, key=vocabulary.__getitem__), [(a, b) for a, b in merges])


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Read what Tokenizer.save wrote, or GPT-2's tokenizer as Hugging Face saves it; nothing in a file is executed.

    Args:
        path: a tokenizer's JSON file, or a folder with tokenizer.json, or vocab.json and merges.txt.

    Raises DataError: it is missing or is no tokenizer's file, its parts do not fit together, or it is one of Hugging
        Face's that gives other ids than GPT-2's way would.
    """
    path = Path(path)
    if path.is_dir():
        names = (_FILE, gpt2_tokenizer.VOCABULARY)
        found = next((path / name for name in names if (path / name).exists()), None)
        if found is None:
            raise DataError(f"{path}: expected {' or '.join(names)} in this folder, got neither")
        path = found
    if path.name == gpt2_tokenizer.VOCABULARY:
        return _bpe(gpt2_tokenizer.of_files(path.parent), path)
    with parsing(path, "a tokenizer's file"):
        raw = read_bytes(path)
    with parsing(path, "a tokenizer's JSON file", _ANEW):
        contents = json.loads(raw)
    if isinstance(contents, dict) and isinstance(contents.get("model"), dict) and "vocab" in contents["model"]:
        return _bpe(gpt2_tokenizer.of_model(contents, path), path)
    kinds = (*KINDS, HuggingFaceTokenizer.kind)
    if not isinstance(contents, dict) or contents.get("form") != FORM or contents.get("kind") not in kinds:
        got = f"fields {listed(contents)}" if isinstance(contents, dict) else type(contents).__name__
        raise DataError(
            f'{path}: expected a JSON object of form "{FORM}" and kind {", ".join(KINDS)}; got {got};'
            f" remedy: the file that Tokenizer.save wrote"
        )
    if contents.get("version") != VERSION:
        got = brief(contents.get("version"))
        raise DataError(f"{path}: expected version {VERSION}, got {got}; remedy: another genai-fast")
    if contents["kind"] == "byte":
        return ByteTokenizer()
    if contents["kind"] == "bpe":
        return _bpe(contents, path)
    if contents["kind"] == HuggingFaceTokenizer.kind:
        with parsing(path, "the tokenizer that was saved", _ANEW):
            parts = (contents[name] for name in ("contents", "size", "end"))
            return HuggingFaceTokenizer(*parts, path, contents["others"])
    if problem := _check_char(contents):
        raise DataError(f"{path}: {problem}; remedy: {_ANEW}")
    return CharTokenizer(contents["characters"])


def _bpe(contents: dict[str, Any], path: Path) -> BPETokenizer:
    if problem := _check_bpe(contents):
        raise DataError(f"{path}: {problem}; remedy: {_ANEW}")
    return BPETokenizer(contents["tokens"], contents["merges"])


_ANEW = "save it again"


def _check_char(contents: dict[str, Any]) -> str:
    characters = contents.get("characters")
    if not isinstance(characters, str) or not characters:
        return f"expected characters as a string, got {type(characters).__name__} {str(characters)[:20]!r}"
    if sorted(set(characters)) != list(characters) or scalars(characters) != characters or _UNKNOWN in characters:
        return "expected different characters in the order of their code points, got others"
    return ""


def _check_bpe(contents: dict[str, Any]) -> str:
    tokens, merges = contents.get("tokens"), contents.get("merges")
    if not isinstance(tokens, list) or not all(isinstance(token, str) and token for token in tokens):
        return "expected tokens as a list of strings, got others"
    known, alphabet = set(tokens), set(byte_alphabet())
    if len(known) < len(tokens) or not alphabet <= known or not set("".join(tokens)) <= alphabet:
        return "expected different tokens of GPT-2's byte alphabet, and each of its 256 characters as one, got others"
    if not isinstance(merges, list) or not all(_is_pair(merge) for merge in merges):
        return "expected merges as a list of pairs of strings, got others"
    for a, b in merges:
        if not known.issuperset((a, b, a + b)):
            return f"expected merges of tokens to a token, got {brief(a)} and {brief(b)}"
    return ""


def _is_pair(merge: Any) -> bool:
    return isinstance(merge, list) and len(merge) == 2 and all(isinstance(side, str) for side in merge)
