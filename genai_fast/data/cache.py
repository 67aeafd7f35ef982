"""Prepared data, kept: decoded pictures, encoded text. An entry is a folder with .npy files that are mapped, and JSON.

An entry's name is two hashes: of where the data came from and what was made of them, and of what lay there. Another
state of the same source so has another name, and replaces the entry before it. Entries are written under a hidden name
and renamed as one; what is damaged or of another version is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from genai_fast import atomic_files, autotune
from genai_fast.data.images import array_digest
from genai_fast.data.reading import read_bytes

VERSION = 3  # of the entry's form and of how pictures become pixels
PIXELS, _META = "pixels", "meta.json"
ENTRY = re.compile("[0-9a-f]{24}-[0-9a-f]{24}")  # an entry's name
_HIDDEN = re.compile(rf"\.{ENTRY.pattern}\..*")
_ABANDONED = 24 * 3600  # seconds after which a hidden folder's writer is taken for dead


def folder(kind: str) -> Path:
    """Where entries of a kind lie."""
    return autotune.folder() / kind


class Found(NamedTuple):
    """What an entry holds: arrays by name, mapped and private to this process; array_digest of each; its JSON data."""

    arrays: dict[str, np.ndarray]
    digests: dict[str, str]
    about: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One set of prepared data: its folder, there or not."""

    path: Path

    @classmethod
    def of(cls, parent: Path, origin: Any, state: Any) -> Entry:
        """The entry for data from `origin` in `state`, both JSON data."""
        return cls(parent / f"{_hash(origin)}-{_hash(state)}")

    def read(self) -> Found | None:
        """What it holds; None: absent or damaged. All of it is read once, for its check sums."""
        try:
            meta = json.loads(read_bytes(self.path / _META))
            if meta["version"] != VERSION or not isinstance(meta["about"], dict):
                return None
            arrays, digests = {}, {}
            for name, form in meta["arrays"].items():
                if (self.path / f"{name}.npy").stat().st_size != form["bytes"]:
                    return None
                # Copy on write: torch wants memory that may be written, and the file stays as it is.
                array = np.load(self.path / f"{name}.npy", mmap_mode="c", allow_pickle=False)
                if array_digest(array) != form["digest"]:
                    return None
                arrays[name], digests[name] = array, form["digest"]
            return Found(arrays, digests, meta["about"])
        except Exception:  # as many as there are ways to damage JSON and headers
            return None

    @contextlib.contextmanager
    def writer(self) -> Iterator[Path]:
        """A hidden folder to put .npy files into; `finish` makes an entry of it, and else it goes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_old(self.path.parent, _HIDDEN, _ABANDONED)
        hidden = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        hidden.mkdir()
        try:
            yield hidden
        finally:
            shutil.rmtree(hidden, ignore_errors=True)

    def finish(self, hidden: Path, about: dict[str, Any]) -> None:
        """Put the entry in its place, with `about`, JSON data; remove what it replaces."""
        arrays = {}
        for file in hidden.glob("*.npy"):
            array = np.load(file, mmap_mode="r", allow_pickle=False)
            arrays[file.stem] = {"bytes": file.stat().st_size, "digest": array_digest(array)}
        meta = {"version": VERSION, "arrays": arrays, "about": about}
        (hidden / _META).write_text(json.dumps(meta), encoding="utf-8")
        atomic_files.synchronize(hidden / _META)
        for old in self.path.parent.glob(f"{self.path.name.partition('-')[0]}-*"):
            if old != self.path or self.read() is None:
                with contextlib.suppress(OSError):  # out of the way at once, for another process may be looking
                    atomic_files.discard(old.rename(hidden.with_name(f"{hidden.name}.{old.name}")))
        try:
            os.rename(hidden, self.path)
        except OSError:
            if self.read() is None:  # otherwise another process was first, and its entry is as good
                raise


def remove_old(parent: Path, name: re.Pattern[str], seconds: float) -> None:
    """Remove the folders of such names that have not changed for so long; the parent may hold other things too."""
    for found in parent.iterdir():
        with contextlib.suppress(OSError):
            if name.fullmatch(found.name) and time.time() - found.lstat().st_mtime > seconds:
                atomic_files.discard(found)


def new_array(hidden: Path, name: str, shape: tuple[int, ...], dtype: Any = np.uint8) -> np.memmap:
    """A file of zeros to write into. Raises OSError: the disk has no room for it."""
    array = np.lib.format.open_memmap(hidden / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a full disk would otherwise end the process in the middle of writing
        with open(hidden / f"{name}.npy", "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
    return array


def write_one_after_another(path: Path, arrays: Iterable[np.ndarray], dtype: Any) -> np.ndarray:
    """Write arrays [n] as they come to a .npy file, one after the other.

    Returns: offsets [arrays + 1] int64: array k is [offsets[k] : offsets[k + 1]].
    """
    lengths = [0]
    with open(path, "wb") as file:
        _header(file, np.dtype(dtype), 0)  # NumPy leaves room in it for a larger number
        start = file.tell()
        for array in arrays:
            file.write(np.ascontiguousarray(array, dtype).data)
            lengths.append(len(array))
        offsets = np.cumsum(lengths, dtype=np.int64)
        file.seek(0)
        _header(file, np.dtype(dtype), int(offsets[-1]))
        if file.tell() != start:
            raise OSError(f"header of {file.tell()} bytes where {start} are free")
    return offsets


def _header(file: BinaryIO, dtype: np.dtype, count: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def keep_rows(hidden: Path, pixels: np.memmap, rows: np.ndarray) -> None:
    """Rewrite the file with these rows alone."""
    shape = (len(rows), *pixels.shape[1:])
    kept = np.lib.format.open_memmap(hidden / f"{PIXELS}.new", mode="w+", dtype=np.uint8, shape=shape)
    for first in range(0, len(rows), 256):
        kept[first : first + 256] = pixels[rows[first : first + 256]]
    kept.flush()
    os.replace(hidden / f"{PIXELS}.new", hidden / f"{PIXELS}.npy")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]
