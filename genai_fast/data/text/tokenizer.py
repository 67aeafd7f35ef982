"""What a tokenizer is: text to ids and back, and one JSON file."""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genai_fast import atomic_files

FORM, VERSION = "genai_fast tokenizer", 1


class Tokenizer(ABC):
    """Text to ids and back.

    kind: "byte", "char", "bpe" or "hugging-face".
    size: number of ids, the special one included: ids are 0 .. size - 1.
    end: the special id. It separates documents, ends a sequence and begins one; no text is ever encoded to it.
    unknown: the id of characters that have none, or None where every text has its own ids.
    others: more ids at which a text that is generated ends.
    """

    kind: str
    size: int
    end: int
    unknown: int | None = None
    others: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        """The ids of a text; a lone surrogate counts as U+FFFD."""
        return next(self.arrays([text])).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: `end` has none; what is no UTF-8, and what is unknown, is U+FFFD.

        Raises ValueError: there is no such id.
        """
        stream = self.stream()
        return "".join([stream.put(i) for i in ids]) + stream.close()

    @abstractmethod
    def arrays(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each text, an integer array [length]; many at a time are faster than one by one."""

    def stream(self) -> Stream:
        """Decodes ids as they come."""
        return Stream(self._table)

    @abstractmethod
    def _contents(self) -> dict[str, Any]:
        """What makes it up, as JSON data."""

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that are equal only for tokenizers that encode alike."""
        return hashlib.sha256(json.dumps(self._file(), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file, for read_tokenizer."""
        atomic_files.write_text(Path(path), json.dumps(self._file()))

    def _file(self) -> dict[str, Any]:
        return {"form": FORM, "version": VERSION, "kind": self.kind, **self._contents()}

    def __repr__(self) -> str:
        return f"<{self.kind} tokenizer of {self.size} ids, {self.digest}>"


class Stream:
    """Text of ids that come one by one; table: the bytes of each id but the end."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token: int) -> str:
        """The text that is complete with this id: "" while a character is open. Raises ValueError: no such id."""
        end = len(self._table)
        if not 0 <= token <= end:
            raise ValueError(f"decode: expected ids from 0 to {end}, got {token}; remedy: its own tokenizer")
        return "" if token == end else self._decoder.decode(self._table[token])

    def close(self) -> str:
        """The end has come: U+FFFD for a character that is still open."""
        return self._decoder.decode(b"", True)


@functools.cache
def byte_alphabet() -> str:
    """GPT-2's character for each byte: itself if it is printable, else the next one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(value if value in printable else next(others)) for value in range(256))
