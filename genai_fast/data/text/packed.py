"""Documents as one row of ids, in a mapped file of the cache."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genai_fast.data import cache as store
from genai_fast.data.errors import DataError, DataWarning
from genai_fast.data.text.corpus import text_digest
from genai_fast.data.text.tokenizers import Tokenizer

_VERSION = 1  # of how text becomes ids
_MANY = 0.01  # unknown characters from which on one is warned
_UNUSED = 30 * 24 * 3600  # seconds without a reader after which an entry goes: each split of a text has its own


@dataclass(frozen=True)
class Tokens:
    """Documents' ids, one after the other, each with the end behind it.

    ids: [n] uint16 or uint32; may be a mapped file.
    offsets: [documents + 1] int64: document d is ids[offsets[d] : offsets[d + 1]], the last of which is the end.
    end: the id that ends a document; only there it occurs.
    unknown: characters that the tokenizer has no id for.
    """

    ids: np.ndarray
    offsets: np.ndarray
    end: int
    unknown: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.offsets) - 1


def pack(documents: Sequence[str], tokenizer: Tokenizer, cache: bool | str | Path | None = None) -> Tokens:
    """Encode documents once; the next time their ids are there and only mapped.

    Args:
        documents: texts, in order.
        tokenizer: what encodes them.
        cache: a folder for ids; None or True: `tokens` in $GENAI_FAST_CACHE, else in the user's cache folder, where
            nothing is lost if it is removed; False: encode into memory.

    Raises DataError: there are no documents.
    """
    if isinstance(documents, str) or not len(documents):
        got = "one str" if documents else "none"
        raise DataError(f"pack: expected a list of at least one document, got {got}")
    tokens = None
    if cache is not False:
        parent = store.folder("tokens") if cache in (None, True) else Path(cache)
        entry = store.Entry.of(parent, [text_digest(documents), tokenizer.digest], _VERSION)
        tokens = _kept(entry, len(documents), tokenizer) or _write(entry, documents, tokenizer)
    tokens = tokens or _encode(documents, tokenizer)
    if tokens.unknown > _MANY * len(tokens):
        warnings.warn(
            f"pack: {tokens.unknown} of {len(tokens) - tokens.documents} characters are not in the tokenizer and become"
            f" U+FFFD; remedy: a tokenizer made from such text, or one of bytes",
            DataWarning,
            stacklevel=2,
        )
    return tokens


def pack_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, cache: bool | str | Path | None = None
) -> tuple[Tokens, Tokens]:
    """(sources, targets) of pairs, each as `pack` makes them: document d of the one belongs to document d of the other.

    Raises DataError: there are no pairs.
    """
    return pack([pair[0] for pair in pairs], tokenizer, cache), pack([pair[1] for pair in pairs], tokenizer, cache)


def _arrays(documents: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    """(ids with the end behind them, how many are unknown) of each document."""
    for found in tokenizer.arrays(documents):
        ids = np.empty(len(found) + 1, _dtype(tokenizer))
        ids[:-1], ids[-1] = found, tokenizer.end
        unknown = 0 if tokenizer.unknown is None else int(np.count_nonzero(found == tokenizer.unknown))
        yield ids, unknown


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)


def _encode(documents: Sequence[str], tokenizer: Tokenizer) -> Tokens:
    arrays, unknown = zip(*_arrays(documents, tokenizer), strict=True)
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return Tokens(np.concatenate(arrays), offsets, tokenizer.end, sum(unknown))


def _kept(entry: store.Entry, documents: int, tokenizer: Tokenizer) -> Tokens | None:
    """What an entry holds, if it is of this many documents in this tokenizer's ids: its folder may be shared."""
    found = entry.read()
    if found is None or not {"ids", "offsets"} <= found.arrays.keys():
        return None
    ids, offsets, unknown = found.arrays["ids"], found.arrays["offsets"], found.about.get("unknown")
    if ids.dtype != _dtype(tokenizer) or ids.ndim != 1:
        return None
    if offsets.dtype != np.int64 or offsets.shape != (documents + 1,):
        return None
    if offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 1).any() or ids.max() >= tokenizer.size:
        return None
    if not isinstance(unknown, int):
        return None
    with contextlib.suppress(OSError):
        os.utime(entry.path)  # it has been used
    return Tokens(ids, offsets, tokenizer.end, unknown)


def _write(entry: store.Entry, documents: Sequence[str], tokenizer: Tokenizer) -> Tokens | None:
    try:
        with entry.writer() as hidden:
            unknown: list[int] = []
            ids = (unknown.append(count) or each for each, count in _arrays(documents, tokenizer))
            offsets = store.write_one_after_another(hidden / "ids.npy", ids, _dtype(tokenizer))
            np.save(hidden / "offsets.npy", offsets)
            entry.finish(hidden, {"unknown": sum(unknown)})
        store.remove_old(entry.path.parent, store.ENTRY, _UNUSED)
        return _kept(entry, len(documents), tokenizer)
    except OSError as error:
        message = f"{entry.path}: cannot be written: {error.strerror or error}; text is encoded to memory"
        warnings.warn(message, DataWarning, stacklevel=3)
        return None
