"""Folders and zip files of pictures: decoded once, in threads, into a mapped file of the cache."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch

from genai_fast.cpu import allowed_cores
from genai_fast.data import cache as store
from genai_fast.data import picture
from genai_fast.data.images import DataError, DataWarning, Images
from genai_fast.data.picture import Form

_NAMED = 3  # broken files that a warning names
_CHUNK = 32  # pictures a task of the thread pool
_LARGEST = 1 << 30  # bytes of a file in a zip: more is no picture

T = TypeVar("T")


class _Folder:
    """Pictures directly in a folder, or in subfolders, each of which is a class."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = sorted(self._scan(path, ""))
        self.names = [name for name, *_ in found]
        self.state: list[Any] = found

    def _scan(self, path: Path | str, under: str) -> Iterator[tuple[str, int, int]]:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_file() and entry.name.lower().endswith(picture.SUFFIXES):
                    about = entry.stat()
                    yield under + entry.name, about.st_size, about.st_mtime_ns
                elif not under and entry.is_dir():
                    yield from self._scan(entry.path, f"{entry.name}/")

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb")

    def close(self) -> None:
        pass


class _Zip:
    """The same in a zip file, where all may lie in one more folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise DataError(f"{path}: expected a zip file, got {error}; remedy: fetch it again") from error
        names = {info.filename for info in self._file.infolist() if _is_picture(info.filename)}
        tops = {name.partition("/")[0] if "/" in name else "" for name in names}
        self._top = f"{tops.pop()}/".lstrip("/") if len(tops) == 1 else ""
        shorter = (name[len(self._top) :] for name in names)
        self.names = sorted(name for name in shorter if name.count("/") <= 1)
        about = path.stat()
        self.state = [about.st_size, about.st_mtime_ns]

    def open(self, name: str) -> BinaryIO:
        info = self._file.getinfo(self._top + name)
        if info.file_size > _LARGEST:
            raise ValueError(f"{info.file_size} bytes")
        return io.BytesIO(self._file.read(info))

    def close(self) -> None:
        self._file.close()


def _is_picture(name: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return not hidden and name.lower().endswith(picture.SUFFIXES)


Source = _Folder | _Zip


def load_pictures(path: Path, size: int | None, *, strict: bool, cache: bool | str | Path | None) -> Images:
    """See genai_fast.data.load."""
    if size is not None and size < 1:
        raise DataError(f"size: expected at least 1 pixel, got {size}")
    picture.check_pillow()
    source = _Folder(path) if path.is_dir() else _Zip(path)
    try:
        if not source.names:
            raise DataError(
                f"{path}: expected pictures ({', '.join(picture.SUFFIXES)}) in it or in its subfolders, got none"
            )
        entry = None
        if cache is not False:
            parent = store.folder("images") if cache in (None, True) else Path(cache)
            entry = store.Entry.of(parent, [str(path.resolve()), size], source.state)
        pixels, broken = (entry and _kept(entry)) or _decode(source, size, entry)
    finally:
        source.close()
    if broken:
        _report(path, broken, len(source.names), strict)
    labels, classes = _classes(source.names, broken)
    return Images(path.name, torch.from_numpy(pixels), labels, classes, tuple(broken))


def _kept(entry: store.Entry) -> tuple[np.ndarray, dict[str, str]] | None:
    found = entry.read()
    return found and (found[0][store.PIXELS], found[1]["broken"])


def _report(path: Path, broken: dict[str, str], count: int, strict: bool) -> None:
    name, why = next(iter(broken.items()))
    remedy = "replace or remove what is broken"
    if strict or len(broken) == count:
        raise DataError(
            f"{path / name}: expected a picture, got {why}; {len(broken)} of {count} files are broken; remedy: {remedy}"
        )
    named = ", ".join(f"{name} ({why})" for name, why in list(broken.items())[:_NAMED])
    more = ", ..." if len(broken) > _NAMED else ""
    message = f"{path}: {len(broken)} of {count} pictures are broken and left out: {named}{more}; remedy: {remedy}"
    warnings.warn(message, DataWarning, stacklevel=4)


def _classes(names: list[str], broken: dict[str, str]) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """Labels of the pictures that are whole; every subfolder is a class, even if nothing in it is."""
    folders = sorted({name.rpartition("/")[0] for name in names})
    if "" in folders:
        return None, ()
    number = {folder: k for k, folder in enumerate(folders)}
    labels = [number[name.rpartition("/")[0]] for name in names if name not in broken]
    return torch.tensor(labels), tuple(folders)


def _decode(source: Source, size: int | None, entry: store.Entry | None) -> tuple[np.ndarray, dict[str, str]]:
    """(pixels, what is broken and why), by way of a new entry of the cache if there is one to make."""
    numbers, form, broken = _survey(source, size)
    names = [source.names[k] for k in numbers]
    shape = (len(names), 1 if form.grey else 3, form.height, form.width)

    def fill(pixels: np.ndarray) -> np.ndarray:
        def one(row: int) -> None:
            with source.open(names[row]) as file:
                pixels[row] = picture.read_pixels(file, form, size)

        failed = {row: why for row, why in enumerate(_in_threads(one, range(len(names)))) if why is not None}
        broken.update((names[row], why) for row, why in failed.items())
        if len(broken) == len(source.names):
            _report(source.path, _in_order(source, broken), len(broken), True)
        return np.array([row for row in range(len(names)) if row not in failed])

    if entry is not None:
        try:
            with entry.writer() as hidden:
                pixels = store.new_pixels(hidden, shape)
                rows = fill(pixels)
                pixels.flush()
                if len(rows) < len(names):
                    store.keep_rows(hidden, pixels, rows)
                broken = _in_order(source, broken)
                entry.finish(hidden, {"broken": broken})
            if found := _kept(entry):
                return found
        except OSError as error:
            message = f"{entry.path}: cannot be written: {error.strerror or error}; pictures are decoded to memory"
            warnings.warn(message, DataWarning, stacklevel=4)
    pixels = np.empty(shape, np.uint8)
    rows = fill(pixels)
    return (pixels if len(rows) == len(names) else pixels[rows]), _in_order(source, broken)


def _in_order(source: Source, broken: dict[str, str]) -> dict[str, str]:
    return {name: broken[name] for name in source.names if name in broken}


def _survey(source: Source, size: int | None) -> tuple[list[int], Form, dict[str, str]]:
    """(numbers of the files with a good header, what all pictures will be, what is broken and why)."""

    def form_of(k: int) -> Form:
        with source.open(source.names[k]) as file:
            return picture.read_form(file, size)

    forms = dict(enumerate(_in_threads(form_of, range(len(source.names)))))
    broken = {source.names[k]: form for k, form in forms.items() if isinstance(form, str)}
    good = {k: form for k, form in forms.items() if not isinstance(form, str)}
    by_size: dict[tuple[int, int], list[int]] = {}
    for k, form in good.items():
        by_size.setdefault(form[:2], []).append(k)
    whole = []
    for numbers in by_size.values() if len(by_size) > 1 else ():
        # A header may lie: only pictures that can be decoded have a size.
        for k in numbers:
            try:
                with source.open(source.names[k]) as file:
                    picture.read_pixels(file, good[k], size)
            except Exception as error:
                broken[source.names[k]] = picture.reason(error)
                del good[k]
            else:
                whole.append(k)
                break
    if len(whole) > 1:
        one, other = whole[:2]
        expected, got = ("{} x {}".format(*good[k][:2]) for k in (one, other))
        raise DataError(
            f"{source.path / source.names[other]}: expected {expected} pixels as {source.names[one]} has, got {got};"
            f" remedy: --size PIXELS"
        )
    if not good:
        _report(source.path, _in_order(source, broken), len(broken), True)
    width, height, _ = next(iter(good.values()))
    return list(good), Form(width, height, all(form.grey for form in good.values())), broken


def _in_threads(work: Callable[[int], T], numbers: range) -> list[T | str]:
    """work(number) of each; in words what is wrong with the file where it raises."""

    def attempt(number: int) -> T | str:
        try:
            return work(number)
        except Exception as error:  # Pillow raises all kinds on broken files
            return picture.reason(error)

    def chunk(first: int) -> list[T | str]:
        return [attempt(number) for number in numbers[first : first + _CHUNK]]

    pool = ThreadPoolExecutor(allowed_cores())
    try:
        return [result for results in pool.map(chunk, range(0, len(numbers), _CHUNK)) for result in results]
    finally:
        pool.shutdown(cancel_futures=True)  # what an interrupt leaves is not done
