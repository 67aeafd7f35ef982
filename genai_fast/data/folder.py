"""Folders and zip files of pictures: decoded once, in threads, into a mapped file of the cache."""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch

from genai_fast.cpu import allowed_cores
from genai_fast.data import cache as store
from genai_fast.data import picture
from genai_fast.data.archive import Archive
from genai_fast.data.errors import DataError, DataWarning, printable, reason
from genai_fast.data.images import Images
from genai_fast.data.picture import Form
from genai_fast.data.reading import hidden, open_regular, parsing

_NAMED = 3  # broken files that a warning names
_CHUNK = 32  # pictures a task of the thread pool
_DEEPEST = 8  # folders below a folder

T = TypeVar("T")


class _Folder:
    """Pictures in a folder and below it, by name: path under the folder. Links are followed."""

    def __init__(self, path: Path) -> None:
        with parsing(path, "a folder of pictures"):
            self._about = {name: about for name, *about in self._scan(path, "", ())}
        self.arranged = _arrange(sorted(self._about), packed=False)
        self.path = path / self.arranged.under
        self.state: list[Any] = [(name, *self._about[self.arranged.under + name]) for name in self.arranged.names]

    def _scan(self, path: Path | str, under: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, int, int]]:
        about = os.stat(path)
        here = (about.st_dev, about.st_ino)
        if here in above or len(above) > _DEEPEST:  # a link to a folder above
            return
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if hidden(entry.name):
                    continue
                if entry.is_file() and entry.name.lower().endswith(picture.SUFFIXES):
                    about = entry.stat()
                    yield under + entry.name, about.st_size, about.st_mtime_ns
                elif entry.is_dir():
                    # Pictures further down do not count.
                    with contextlib.suppress(PermissionError) if above else contextlib.nullcontext():
                        yield from self._scan(entry.path, f"{under}{entry.name}/", (*above, here))

    def open(self, name: str) -> BinaryIO:
        return open_regular(self.path / name)

    def close(self) -> None:
        pass


class _Zip:
    """The same in a zip file, where all may lie in one more folder."""

    def __init__(self, path: Path) -> None:
        self._file = Archive(path, lambda name: not hidden(name) and name.lower().endswith(picture.SUFFIXES))
        self.arranged = _arrange(sorted(self._file.names), packed=True)
        self.path = path / self.arranged.under
        about = path.stat()
        self.state = [about.st_size, about.st_mtime_ns, *self.arranged.names]

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self._file.read(self.arranged.under + name))

    def close(self) -> None:
        self._file.close()


Source = _Folder | _Zip


class _Arranged(NamedTuple):
    under: str  # folders that all pictures share, ending in "/", or ""
    names: list[str]  # pictures below it that count: all of them directly in it, or in one folder for each class
    left_out: list[str]  # others
    loose: int = 0  # pictures that count and lie beside folders with others, so that there are no classes


def _arrange(names: list[str], packed: bool) -> _Arranged:
    """Which pictures count. A few beside two or more class folders do not, nor do those deeper than a class folder."""
    under = ""
    while names and "/" in names[0]:
        top = names[0].partition("/")[0] + "/"
        alone = all(name.startswith(top) for name in names)
        if not alone or not ((packed and not under) or all(name.count("/") > 1 for name in names)):
            break
        under, names = under + top, [name.removeprefix(top) for name in names]
    loose = [name for name in names if "/" not in name]
    inner = [name for name in names if name.count("/") == 1]
    deep = [name for name in names if name.count("/") > 1]
    if len({name.partition("/")[0] for name in inner}) > 1 and len(loose) < len(inner):
        return _Arranged(under, inner, loose + deep)
    return _Arranged(under, [name for name in names if name.count("/") < 2], deep, len(loose) if inner else 0)


def load_pictures(path: Path, size: int | None, *, strict: bool, cache: bool | str | Path | None) -> Images:
    """See genai_fast.data.load."""
    if size is not None and size < 1:
        raise DataError(f"size: expected at least 1 pixel, got {size}")
    picture.check_pillow()
    source = _Folder(path) if path.is_dir() else _Zip(path)
    try:
        _check_arranged(path, source.arranged, strict)
        entry = None
        if cache is not False:
            parent = store.folder("images") if cache in (None, True) else Path(cache)
            entry = store.Entry.of(parent, [str(path.resolve()), size], source.state)
        pixels, broken, content = (entry and _kept(entry, source)) or _decode(source, size, entry)
    finally:
        source.close()
    if broken:
        _report(source.path, broken, len(source.arranged.names), strict)
    labels, classes = _classes(source.arranged.names, broken)
    skipped = tuple(map(printable, broken))
    names = tuple(name for name in source.arranged.names if name not in broken)
    return Images(path.name, torch.from_numpy(pixels), labels, classes, skipped, content=content, names=names)


def _check_arranged(path: Path, arranged: _Arranged, strict: bool) -> None:
    if not arranged.names:
        if not arranged.left_out:
            raise DataError(
                f"{path}: expected pictures ({', '.join(picture.SUFFIXES)}) in it or in its subfolders, got none;"
                f" remedy: another folder"
            )
        first = arranged.left_out[0]
        raise DataError(
            f"{path}: expected pictures in it or in one subfolder for each class, got them deeper, such as {first};"
            f" remedy: one of its folders, such as {first.partition('/')[0]}"
        )
    if arranged.left_out:
        where = "lie beside or below the folders of classes, or deeper"
        message = f"{path}: {len(arranged.left_out)} pictures {where}, such as {arranged.left_out[0]}"
        if strict:
            raise DataError(f"{message}; remedy: move or remove them")
        warnings.warn(f"{message}, and are left out; remedy: move or remove them", DataWarning, stacklevel=4)
    if arranged.loose:
        message = f"{path}: {arranged.loose} pictures are next to its subfolders, so there are no classes"
        warnings.warn(f"{message}; remedy: one subfolder for each class and no others", DataWarning, stacklevel=4)


_Decoded = tuple[np.ndarray, dict[str, str], str]  # pixels, what is broken and why, array_digest or ""


def _kept(entry: store.Entry, source: Source) -> _Decoded | None:
    """What an entry holds, if it is of these pictures: its folder may be shared with others."""
    found = entry.read()
    if found is None:
        return None
    pixels, broken = found.arrays.get(store.PIXELS), found.about.get("broken")
    fits = pixels is not None and pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[1] in (1, 3)
    names = source.arranged.names
    if not fits or not isinstance(broken, dict) or not broken.keys() <= set(names):
        return None
    return (pixels, broken, found.digests[store.PIXELS]) if len(pixels) == len(names) - len(broken) else None


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
    return torch.tensor(labels), tuple(map(printable, folders))


def _decode(source: Source, size: int | None, entry: store.Entry | None) -> _Decoded:
    """The pictures, by way of a new entry of the cache if there is one to make."""
    numbers, form, broken = _survey(source, size)
    names = [source.arranged.names[k] for k in numbers]
    shape = (len(names), 1 if form.grey else 3, form.height, form.width)

    def fill(pixels: np.ndarray) -> np.ndarray:
        def one(row: int) -> None:
            with source.open(names[row]) as file:
                pixels[row] = picture.read_pixels(file, form, size)

        failed = {row: why for row, why in enumerate(_in_threads(one, range(len(names)))) if why is not None}
        broken.update((names[row], why) for row, why in failed.items())
        if len(broken) == len(source.arranged.names):
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
            if found := _kept(entry, source):
                return found
        except OSError as error:
            message = f"{entry.path}: cannot be written: {error.strerror or error}; pictures are decoded to memory"
            warnings.warn(message, DataWarning, stacklevel=4)
    pixels = np.empty(shape, np.uint8)
    rows = fill(pixels)
    return (pixels if len(rows) == len(names) else pixels[rows]), _in_order(source, broken), ""


def _in_order(source: Source, broken: dict[str, str]) -> dict[str, str]:
    return {name: broken[name] for name in source.arranged.names if name in broken}


def _survey(source: Source, size: int | None) -> tuple[list[int], Form, dict[str, str]]:
    """(numbers of the files with a good header, what all pictures will be, what is broken and why)."""

    def form_of(k: int) -> Form:
        with source.open(source.arranged.names[k]) as file:
            return picture.read_form(file, size)

    forms = dict(enumerate(_in_threads(form_of, range(len(source.arranged.names)))))
    broken = {source.arranged.names[k]: form for k, form in forms.items() if isinstance(form, str)}
    good = {k: form for k, form in forms.items() if not isinstance(form, str)}
    by_size: dict[tuple[int, int], list[int]] = {}
    for k, form in good.items():
        by_size.setdefault(form[:2], []).append(k)
    whole = []
    for numbers in by_size.values() if len(by_size) > 1 else ():
        # A header may lie: only pictures that can be decoded have a size.
        for k in numbers:
            try:
                with source.open(source.arranged.names[k]) as file:
                    picture.read_pixels(file, good[k], size)
            except Exception as error:
                broken[source.arranged.names[k]] = reason(error)
                del good[k]
            else:
                whole.append(k)
                break
    if len(whole) > 1:
        one, other = (source.arranged.names[k] for k in whole[:2])
        expected, got = ("{} x {}".format(*good[k][:2]) for k in whole[:2])
        raise DataError(
            f"{source.path / other}: expected {expected} pixels as {one} has, got {got}; remedy: --size PIXELS"
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
            return reason(error)

    def chunk(first: int) -> list[T | str]:
        return [attempt(number) for number in numbers[first : first + _CHUNK]]

    pool = ThreadPoolExecutor(allowed_cores())
    try:
        return [result for results in pool.map(chunk, range(0, len(numbers), _CHUNK)) for result in results]
    finally:
        pool.shutdown(cancel_futures=True)  # what an interrupt leaves is not done
