"""Where sounds come from: espeak-ng's digits, a file, folders and zip files; decoded once into a mapped file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from genai_fast.cpu import allowed_cores
from genai_fast.data import cache as store
from genai_fast.data.audio import spoken
from genai_fast.data.audio.sound import SUFFIXES, Treatment, check_packages, read_samples
from genai_fast.data.audio.sounds import Sounds
from genai_fast.data.class_folders import (
    Arranged,
    Kind,
    Source,
    check_arranged,
    in_threads,
    labels_of,
    report,
    source_of,
)
from genai_fast.data.errors import DataError, DataWarning, printable
from genai_fast.data.reading import is_folder, open_regular, parsing

SOUNDS = Kind("sound", SUFFIXES)
_VERSION = 1  # of how a file becomes samples
_AT_ONCE = 8  # files per core that are decoded before they are written


class _File:
    """One sound file, whatever its name."""

    def __init__(self, path: Path) -> None:
        with parsing(path, "a sound file"), open_regular(path):
            about = path.stat()
        self.path, self.arranged = path.parent, Arranged("", [path.name], [])
        self.state: list[Any] = [about.st_size, about.st_mtime_ns]

    def open(self, name: str) -> BinaryIO:
        return open_regular(self.path / name)

    def close(self) -> None:
        pass


_AnySource = Source | spoken.SpokenDigits | _File


def load(
    source: str | Path, rate: int = 22050, *, trim: float = 0.0, strict: bool = False,
    cache: bool | str | Path | None = None,
) -> Sounds:  # fmt: skip
    """Read sounds: mono, of one rate, each as loud as 16 bits hold.

    Args:
        source: one of
            "spoken-digits": 2,160 spoken digits that the program espeak-ng makes, with labels;
            a folder or .zip of WAV, FLAC and OGG (Vorbis or Opus) files, flat or with one folder for each class; all
            may be in further folders that hold nothing else;
            such a file.
        rate: samples per second that all are resampled to.
        trim: silence at both ends is cut off: what is that many decibels below the sound's loudest part; 0: nothing
            is, but of "spoken-digits" what is 40 below.
        strict: a broken file is an error. Otherwise it is left out, with one warning for all.
        cache: a folder for the samples, which are then mapped and not read; None or True: `sounds` in
            $GENAI_FAST_CACHE, else in the user's cache folder; False: decode into memory.

    Raises DataError: the source is missing, or nothing in it serves; a UsageError if a package (extra `[audio]`) or
        espeak-ng is missing.
    """
    if rate < 1 or not (math.isfinite(trim) and trim >= 0):
        raise DataError(f"rate, trim: expected at least 1 sample per second and 0 dB, got {rate} and {trim:g}")
    check_packages()
    return _load_sounds(source, treatment(source, rate, trim), strict, cache)


def treatment(source: str | Path, rate: int, trim: float) -> Treatment:
    """What `load` does to each file of a source."""
    return Treatment(rate, spoken.TRIM if str(source) == spoken.NAME and not trim else trim)


def _load_sounds(source: str | Path, how: Treatment, strict: bool, cache: bool | str | Path | None) -> Sounds:
    path, files = Path(source), _opened(source)
    try:
        check_arranged(path, SOUNDS, files.arranged, strict)
        entry = None
        if cache is not False:
            parent = store.folder("sounds") if cache in (None, True) else Path(cache)
            where = str(source) if isinstance(files, spoken.SpokenDigits) else str(path.resolve())
            entry = store.Entry.of(parent, [where, how], [_VERSION, files.state])
        samples, offsets, broken, content = (entry and _kept(entry, files)) or _decode(files, how, entry)
    finally:
        files.close()
    names = files.arranged.names
    if broken:
        report(files.path, SOUNDS, broken, len(names), strict)
    labels, classes = labels_of(names, broken)
    whole, skipped = tuple(name for name in names if name not in broken), tuple(map(printable, broken))
    return Sounds(path.name, samples, offsets, how.rate, labels, classes, skipped, whole, content)


def _opened(source: str | Path) -> _AnySource:
    if str(source) == spoken.NAME:
        return spoken.SpokenDigits()
    path = Path(source)
    if is_folder(path, f"{spoken.NAME} or the path of a file or folder") or path.suffix.lower() == ".zip":
        return source_of(path, SOUNDS)
    return _File(path)


_Decoded = tuple[np.ndarray, np.ndarray, dict[str, str], str]  # samples, offsets, what is broken and why, array_digest


def _kept(entry: store.Entry, files: _AnySource) -> _Decoded | None:
    """What an entry holds, if it is of these files: its folder may be shared with others."""
    found = entry.read()
    if found is None or not {"samples", "offsets"} <= found.arrays.keys():
        return None
    samples, offsets, broken = found.arrays["samples"], found.arrays["offsets"], found.about.get("broken")
    names = files.arranged.names
    if not isinstance(broken, dict) or not broken.keys() <= set(names):
        return None
    if samples.dtype != np.int16 or samples.ndim != 1 or offsets.dtype != np.int64:
        return None
    if offsets.shape != (len(names) - len(broken) + 1,) or offsets[0] or offsets[-1] != len(samples):
        return None
    return None if (np.diff(offsets) < 1).any() else (samples, offsets, broken, found.digests["samples"])


def _decode(files: _AnySource, how: Treatment, entry: store.Entry | None) -> _Decoded:
    """The samples, by way of a new entry of the cache if there is one to make."""
    if entry is not None:
        try:
            with entry.writer() as hidden:
                broken: dict[str, str] = {}
                sounds = _sounds(files, how, broken)
                np.save(hidden / "offsets.npy", store.write_one_after_another(hidden / "samples.npy", sounds, np.int16))
                entry.finish(hidden, {"broken": broken})
            if found := _kept(entry, files):
                return found
        except OSError as error:
            message = f"{entry.path}: cannot be written: {error.strerror or error}; sounds are decoded to memory"
            warnings.warn(message, DataWarning, stacklevel=4)
    broken = {}
    sounds = list(_sounds(files, how, broken))
    return np.concatenate(sounds), np.cumsum([0, *map(len, sounds)], dtype=np.int64), broken, ""


def _sounds(files: _AnySource, how: Treatment, broken: dict[str, str]) -> Iterator[np.ndarray]:
    """The samples of each whole file, in order; why the others are not goes into `broken`.

    Raises DataError: none is whole.
    """
    names = files.arranged.names

    def one(k: int) -> np.ndarray:
        with files.open(names[k]) as file:
            return read_samples(file, how)

    step = _AT_ONCE * allowed_cores()
    for first in range(0, len(names), step):
        numbers = range(first, min(first + step, len(names)))
        for k, found in zip(numbers, in_threads(one, numbers, 1), strict=True):
            if isinstance(found, str):
                broken[names[k]] = found
            else:
                yield found
    if len(broken) == len(names):
        report(files.path, SOUNDS, broken, len(names), True)
