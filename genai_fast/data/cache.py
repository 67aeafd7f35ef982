"""Decoded pictures, kept: a folder each, with the pixels as one .npy file that is mapped, and the rest as JSON.

An entry's name is two hashes: of where the pictures came from and the size they were brought to, and of what lay there.
Another state of the same pictures so has another name, and replaces the entry before it. Entries are written under a
hidden name and renamed as one; what is damaged or of another version is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genai_fast import paths

VERSION = 1  # of the entry's form and of how pictures become pixels
_PIXELS, _META = "pixels.npy", "meta.json"
_ABANDONED = 24 * 3600  # seconds after which a hidden folder's writer is taken for dead


def folder() -> Path:
    """Where entries lie."""
    return paths.folder() / "images"


@dataclass(frozen=True)
class Entry:
    """One set of decoded pictures: its folder, there or not."""

    path: Path

    @classmethod
    def of(cls, parent: Path, origin: Any, state: Any) -> Entry:
        """The entry for pictures from `origin` in `state`, both JSON data."""
        return cls(parent / f"{_hash(origin)}-{_hash(state)}")

    def read(self) -> tuple[np.ndarray, dict[str, Any]] | None:
        """(pixels, mapped and private to this process; what was stored with them), or None: absent or damaged."""
        try:
            meta = json.loads((self.path / _META).read_text(encoding="utf-8"))
            if meta["version"] != VERSION or (self.path / _PIXELS).stat().st_size != meta["bytes"]:
                return None
            # Copy on write: torch wants memory that may be written, and the file stays as it is.
            pixels = np.load(self.path / _PIXELS, mmap_mode="c", allow_pickle=False)
            whole = pixels.dtype == np.uint8 and list(pixels.shape) == meta["shape"]
            return (pixels, meta["about"]) if whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @contextlib.contextmanager
    def writer(self) -> Iterator[Path]:
        """A hidden folder to put the pixels into; `finish` makes an entry of it, and else it goes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for left in self.path.parent.glob(".*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(left)
        hidden = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        hidden.mkdir()
        try:
            yield hidden
        finally:
            shutil.rmtree(hidden, ignore_errors=True)

    def finish(self, hidden: Path, shape: tuple[int, ...], about: dict[str, Any]) -> None:
        """Put the entry in its place, with `about`, JSON data; remove what it replaces."""
        size = (hidden / _PIXELS).stat().st_size
        meta = {"version": VERSION, "bytes": size, "shape": list(shape), "about": about}
        with open(hidden / _META, "w", encoding="utf-8") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())
        for old in self.path.parent.glob(f"{self.path.name.partition('-')[0]}-*"):
            if old != self.path or self.read() is None:
                with contextlib.suppress(OSError):  # out of the way at once, for another process may be looking
                    shutil.rmtree(old.rename(hidden.with_name(f"{hidden.name}.{old.name}")))
        try:
            os.rename(hidden, self.path)
        except OSError:
            if self.read() is None:  # otherwise another process was first, and its entry is as good
                raise


def new_pixels(hidden: Path, shape: tuple[int, ...]) -> np.memmap:
    """A file of zeros to write decoded pictures into.

    Raises:
        OSError: the disk has no room for it.
    """
    pixels = np.lib.format.open_memmap(hidden / _PIXELS, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a full disk would otherwise end the process in the middle of writing
        with open(hidden / _PIXELS, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, pixels.offset + pixels.size)
    return pixels


def keep_rows(hidden: Path, pixels: np.memmap, rows: np.ndarray) -> None:
    """Write the file anew with these rows alone."""
    shape = (len(rows), *pixels.shape[1:])
    kept = np.lib.format.open_memmap(hidden / f"{_PIXELS}.new", mode="w+", dtype=np.uint8, shape=shape)
    for first in range(0, len(rows), 256):
        kept[first : first + 256] = pixels[rows[first : first + 256]]
    kept.flush()
    os.replace(hidden / f"{_PIXELS}.new", hidden / _PIXELS)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]
