"""Folders and zip files of samples: which files count, the classes that subfolders are, and what is broken."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch

from genai_fast.cpu import allowed_cores
from genai_fast.data.archive import Archive
from genai_fast.data.errors import DataError, DataWarning, printable, reason
from genai_fast.data.reading import hidden, open_regular, parsing

_NAMED = 3  # broken files that a warning names
_CHUNK = 32  # files a task of the thread pool
_DEEPEST = 8  # folders below a folder

T = TypeVar("T")


class Kind(NamedTuple):
    """Files of one kind."""

    word: str  # of one of them, in messages: "picture"
    suffixes: tuple[str, ...]


class Arranged(NamedTuple):
    under: str  # folders that all files share, ending in "/", or ""
    names: list[str]  # files below it that count: all of them directly in it, or in one folder for each class
    left_out: list[str]  # others
    loose: int = 0  # files that count and lie beside folders with others, so that there are no classes


class Folder:
    """Files of a kind in a folder and below it, by name: path under the folder. Links are followed.

    arranged: which of them count. path: what their names are relative to. state: changes if any of them does.
    """

    def __init__(self, path: Path, kind: Kind) -> None:
        self._kind = kind
        with parsing(path, f"a folder of {kind.word}s"):
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
                if entry.is_file() and entry.name.lower().endswith(self._kind.suffixes):
                    about = entry.stat()
                    yield under + entry.name, about.st_size, about.st_mtime_ns
                elif entry.is_dir():
                    # Files further down do not count.
                    with contextlib.suppress(PermissionError) if above else contextlib.nullcontext():
                        yield from self._scan(entry.path, f"{under}{entry.name}/", (*above, here))

    def open(self, name: str) -> BinaryIO:
        return open_regular(self.path / name)

    def close(self) -> None:
        pass


class Zip:
    """The same in a zip file, where all may lie in one more folder."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self._file = Archive(path, lambda name: not hidden(name) and name.lower().endswith(kind.suffixes))
        self.arranged = _arrange(sorted(self._file.names), packed=True)
        self.path = path / self.arranged.under
        about = path.stat()
        self.state = [about.st_size, about.st_mtime_ns, *self.arranged.names]

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self._file.read(self.arranged.under + name))

    def close(self) -> None:
        self._file.close()


Source = Folder | Zip


def source_of(path: Path, kind: Kind) -> Source:
    """The files of a kind in a folder, or in a zip file. Close it."""
    return Folder(path, kind) if path.is_dir() else Zip(path, kind)


def _arrange(names: list[str], packed: bool) -> Arranged:
    """Which files count. A few beside two or more class folders do not, nor do those deeper than a class folder."""
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
        return Arranged(under, inner, loose + deep)
    return Arranged(under, [name for name in names if name.count("/") < 2], deep, len(loose) if inner else 0)


def check_arranged(path: Path, kind: Kind, arranged: Arranged, strict: bool) -> None:
    """Warn of files that do not count; the caller's caller's caller is named.

    Raises DataError: none counts; strict: some do not.
    """
    files = f"{kind.word}s"
    if not arranged.names:
        if not arranged.left_out:
            raise DataError(
                f"{path}: expected {files} ({', '.join(kind.suffixes)}) in it or in its subfolders, got none;"
                f" remedy: another folder"
            )
        first = arranged.left_out[0]
        raise DataError(
            f"{path}: expected {files} in it or in one subfolder for each class, got them deeper, such as {first};"
            f" remedy: one of its folders, such as {first.partition('/')[0]}"
        )
    if arranged.left_out:
        where = "lie beside or below the folders of classes, or deeper"
        message = f"{path}: {len(arranged.left_out)} {files} {where}, such as {arranged.left_out[0]}"
        if strict:
            raise DataError(f"{message}; remedy: move or remove them")
        warnings.warn(f"{message}, and are left out; remedy: move or remove them", DataWarning, stacklevel=4)
    if arranged.loose:
        message = f"{path}: {arranged.loose} {files} are next to its subfolders, so there are no classes"
        warnings.warn(f"{message}; remedy: one subfolder for each class and no others", DataWarning, stacklevel=4)


def report(path: Path, kind: Kind, broken: dict[str, str], count: int, strict: bool) -> None:
    """Say which of `count` files are broken (name -> why).

    Raises DataError: strict, or all are.
    """
    name, why = next(iter(broken.items()))
    remedy = "replace or remove what is broken"
    if strict or len(broken) == count:
        raise DataError(
            f"{path / name}: expected a {kind.word}, got {why}; {len(broken)} of {count} files are broken; remedy:"
            f" {remedy}"
        )
    named = ", ".join(f"{name} ({why})" for name, why in list(broken.items())[:_NAMED])
    more = ", ..." if len(broken) > _NAMED else ""
    message = f"{path}: {len(broken)} of {count} {kind.word}s are broken and left out: {named}{more}; remedy: {remedy}"
    warnings.warn(message, DataWarning, stacklevel=4)


def labels_of(names: Sequence[str], broken: dict[str, str]) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """Labels [N] int64 of the whole files, and the classes; every subfolder is one, even if nothing in it is whole."""
    folders = sorted({name.rpartition("/")[0] for name in names})
    if "" in folders:
        return None, ()
    number = {folder: k for k, folder in enumerate(folders)}
    labels = [number[name.rpartition("/")[0]] for name in names if name not in broken]
    return torch.tensor(labels), tuple(map(printable, folders))


def in_threads(work: Callable[[int], T], numbers: Sequence[int], chunk: int = _CHUNK) -> list[T | str]:
    """work(number) of each, `chunk` of them a task; in words what is wrong with the file if it raises."""

    def attempt(number: int) -> T | str:
        try:
            return work(number)
        except Exception as error:  # decoders raise all kinds on broken files
            return reason(error)

    def some(first: int) -> list[T | str]:
        return [attempt(number) for number in numbers[first : first + chunk]]

    pool = ThreadPoolExecutor(allowed_cores())
    try:
        return [result for results in pool.map(some, range(0, len(numbers), chunk)) for result in results]
    finally:
        pool.shutdown(cancel_futures=True)  # what an interrupt leaves is not done
