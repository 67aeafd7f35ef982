"""Tokenizers of Hugging Face's tokenizer.json as they are, by package tokenizers."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genai_fast.data import hugging_face_files as files
from genai_fast.data.errors import DataError, brief
from genai_fast.data.reading import parsing
from genai_fast.data.text.cleaning import scalars
from genai_fast.data.text.tokenizer import Stream, Tokenizer, byte_alphabet
from genai_fast.errors import require

FILE = "tokenizer.json"
_AT_ONCE = 256  # texts
_BEFORE = 8  # ids that a stream decodes again with each new one
_REMEDY = "a checkpoint with a tokenizer.json that package tokenizers reads"


class HuggingFaceTokenizer(Tokenizer):
    """A text begins with what the tokenizer puts before it, such as Llama's <|begin_of_text|>; special tokens in a text
    are ordinary text. Encoding and decoding need package tokenizers.

    Args:
        contents: of tokenizer.json.
        size: ids of the model, at least as many as the tokenizer's; the others have no text.
        end, others: see Tokenizer.

    Raises DataError: package tokenizers cannot read it, it has more ids, or it puts tokens after a text.
    """

    kind = "hugging-face"

    def __init__(
        self, contents: dict[str, Any], size: int, end: int, where: str | Path = FILE, others: Sequence[int] = ()
    ) -> None:
        self._given = {**contents, "padding": None, "truncation": None}
        self.size, self.end, self.others = size, end, tuple(others)
        with parsing(where, "a tokenizer that package tokenizers reads", _REMEDY):
            known = 1 + max(self._encoder.get_vocab(with_added_tokens=True).values())
            around = self._encoder.encode("").ids
        if not known <= size or not 0 <= end < size:
            raise DataError(
                f"{where}: expected at most {size} ids as the model has, and an end below, got {known} and {end};"
                f" remedy: the files that belong together"
            )
        if end in around or self._encoder.encode("a").ids[: len(around)] != around:
            raise DataError(
                f"{where}: expected a tokenizer that puts nothing after a text, got tokens; remedy: {_REMEDY}"
            )

    @functools.cached_property
    def _encoder(self) -> Any:
        encoder = require("tokenizers", "text").Tokenizer.from_str(json.dumps(self._given))
        encoder.encode_special_tokens = True
        return encoder

    def arrays(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        batch: list[str] = []
        for text in texts:
            batch.append(scalars(text))
            if len(batch) == _AT_ONCE:
                yield from self._arrays(batch)
                batch = []
        yield from self._arrays(batch)

    def _arrays(self, texts: list[str]) -> Iterator[np.ndarray]:
        for encoding in self._encoder.encode_batch_fast(texts):
            yield np.array(encoding.ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoder.decode([*ids], skip_special_tokens=True)

    def stream(self) -> Stream:
        return _Stream(self._encoder, self.size)

    def _contents(self) -> dict[str, Any]:
        return {"contents": self._given, "size": self.size, "end": self.end, "others": self.others}


class _Stream(Stream):
    """Of ids that continue a text: a space before the first word stays.

    A decoder sees a few ids before each new one, since what an id means may depend on these; characters come out when
    they are whole.
    """

    def __init__(self, encoder: Any, size: int) -> None:
        self._encoder, self._size = encoder, size
        self._ids: list[int] = encoder.encode("a", add_special_tokens=False).ids
        self._given = len(self._text())

    def _text(self) -> str:
        return self._encoder.decode(self._ids, skip_special_tokens=True)

    def put(self, token: int) -> str:
        if not 0 <= token < self._size:
            raise ValueError(f"decode: expected ids from 0 to {self._size - 1}, got {token}; remedy: its own tokenizer")
        if self._encoder.id_to_token(token) is None:
            return ""
        self._ids.append(token)
        text = self._text()
        if len(text) <= self._given or text.endswith("\ufffd"):
            return ""
        piece = text[self._given :]
        self._ids = self._ids[-_BEFORE:]
        self._given = len(self._text())
        return piece

    def close(self) -> str:
        return self._text()[self._given :]


def read(folder: Path, size: int) -> HuggingFaceTokenizer:
    """The tokenizer of a folder whose model has `size` ids; it ends texts at the eos token of the folder's settings.

    Raises:
        DataError: its files cannot be read, or say nothing of an end.
    """
    path = folder / FILE
    if not path.exists():
        raise DataError(f"{folder}: expected {FILE} in this folder, got none; remedy: {_REMEDY}")
    contents = files.read_json(path, "a tokenizer's JSON file")
    end, *others = _ends(folder, contents)
    return HuggingFaceTokenizer(contents, size, end, path, others)


_END, _UNKNOWN = "<|endoftext|>", "\ufffd"


def written(tokenizer: Tokenizer, block: int) -> dict[str, dict[str, Any]]:
    """The files of a tokenizer in Hugging Face's form, name -> contents; it gives the same ids.

    block: tokens that its model takes.
    """
    saved = tokenizer._contents()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        contents, end = saved["contents"], tokenizer._encoder.id_to_token(tokenizer.end)
    else:
        contents, end = json.loads(_made(tokenizer, saved).to_str()), _END
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "model_max_length": block,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    return {FILE: contents, "tokenizer_config.json": settings}


def _made(tokenizer: Tokenizer, saved: dict[str, Any]) -> Any:
    """One of ours by package tokenizers."""
    package = require("tokenizers", "text")
    if tokenizer.kind == "char":
        characters = {character: k for k, character in enumerate([*saved["characters"], _UNKNOWN])}
        found = package.Tokenizer(package.models.WordLevel(characters, unk_token=_UNKNOWN))
        found.pre_tokenizer = package.pre_tokenizers.Split(package.Regex(r"[\s\S]"), "isolated")
        found.decoder = package.decoders.Fuse()
    else:  # bytes are byte pairs without merges
        tokens, merges = saved.get("tokens") or byte_alphabet(), saved.get("merges") or ()
        model = package.models.BPE({token: k for k, token in enumerate(tokens)}, [tuple(pair) for pair in merges])
        found = package.Tokenizer(model)
        found.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        found.decoder = package.decoders.ByteLevel()
    found.add_special_tokens([package.AddedToken(_END, special=True, normalized=False)])
    return found


def _ends(folder: Path, contents: dict[str, Any]) -> list[int]:
    """The tokens that end a text, as the first of the files says that says so; then those of its generation."""
    added = {token.get("content"): token.get("id") for token in contents.get("added_tokens") or []}
    found: list[int] = []
    for name, key in (
        (files.CONFIG, "eos_token_id"),
        ("generation_config.json", "eos_token_id"),
        ("tokenizer_config.json", "eos_token"),
    ):
        path = folder / name
        value = files.read_json(path, "settings in JSON").get(key) if path.exists() else None
        if value is None or (found and key == "eos_token"):
            continue
        for one in value if isinstance(value, list) else [value]:
            one = one.get("content") if isinstance(one, dict) else one
            token = added.get(one) if isinstance(one, str) else one
            if type(token) is not int:
                raise DataError(
                    f"{path}: {key}: expected tokens, got {brief(one)}; remedy: the files that belong together"
                )
            found.append(token)
    if not found:
        raise DataError(
            f"{folder}: expected eos_token_id in {files.CONFIG}, got none; remedy: add the id that ends a text"
        )
    return [*dict.fromkeys(found)]
