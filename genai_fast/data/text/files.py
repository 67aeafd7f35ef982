"""The files of a source (one, a folder's, a zip's), and what was wrong with them."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from genai_fast.data.images import DataError, DataWarning
from genai_fast.data.text.cleaning import UnreadableError, clean, decode

_NAMED = 3  # what was left out that a warning names
_LARGEST = 1 << 32  # bytes of a file in a zip: more is no text
_CONVERT = "save it as UTF-8 (iconv -f ENCODING -t utf-8)"
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, NotImplementedError)


class Files:
    """The files of a source by name, in order; hidden ones are left out.

    Args:
        path: a file, which always counts; a folder, searched with all below it; or a .zip file of such.
        suffixes: of the files in a folder or zip that count.
    """

    def __init__(self, path: Path, suffixes: tuple[str, ...]) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._base = path
        if path.is_dir():
            names = _below(path)
        elif path.suffix.lower() == ".zip":
            try:
                self._zip = zipfile.ZipFile(path)
            except (*_BAD_ZIP, OSError) as error:
                raise DataError(f"{path}: expected a zip file, got {error}; remedy: fetch it again") from error
            names = [i.filename for i in self._zip.infolist() if not i.is_dir() and not _hidden(i.filename)]
        else:
            self._base, self.names = path.parent, [path.name]
            return
        self.names = sorted(name for name in names if name.lower().endswith(suffixes))
        if not self.names:
            raise DataError(f"{path}: expected files ({', '.join(suffixes)}) in it or in its subfolders, got none")

    def where(self, name: str) -> str:
        """A file's path for messages."""
        return str(self._base / name)

    def read(self, name: str) -> bytes:
        """A file's bytes.

        Raises:
            UnreadableError: it cannot be read.
        """
        try:
            if self._zip is None:
                return (self._base / name).read_bytes()
            if self._zip.getinfo(name).file_size > _LARGEST:
                raise ValueError(f"{self._zip.getinfo(name).file_size} bytes")
            return self._zip.read(name)
        except (OSError, *_BAD_ZIP) as error:
            raise UnreadableError(f"expected text, got {getattr(error, 'strerror', None) or error}") from error


def _below(path: Path) -> Iterator[str]:
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".")]
        under = Path(folder).relative_to(path)
        yield from ((under / name).as_posix() for name in names if not name.startswith("."))


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


@dataclass
class Findings:
    """What was wrong: raised at once if strict, else counted, and warned of once at the end."""

    files: Files
    strict: bool
    left_out: dict[str, str] = field(default_factory=dict)  # name, or "name:line" -> expected and got
    replaced: int = 0
    _replaced_in: dict[str, int] = field(default_factory=dict)  # name -> offset of the first one

    def leave_out(self, name: str, problem: str) -> None:
        """A file or a line does not serve; `problem` is "expected X, got Y"."""
        if self.strict:
            raise DataError(f"{self.files.where(name)}: {problem}; remedy: mend or remove it")
        self.left_out[name] = problem

    def texts(self, charset: Callable[[str, bytes], str]) -> Iterator[tuple[str, str]]:
        """(name, text) of each file that can be read.

        Args:
            charset: given a file's name and bytes, the encoding that it states itself, or "".
        """
        for name in self.files.names:
            try:
                raw = self.files.read(name)
                text, replaced, first = decode(raw, charset(name, raw))
            except UnreadableError as error:
                self.leave_out(name, str(error))
                continue
            if replaced:
                if self.strict:
                    raise DataError(
                        f"{self.files.where(name)}: expected text in UTF-8, got byte 0x{raw[first]:02x} at offset"
                        f" {first}; remedy: {_CONVERT}"
                    )
                self.replaced += replaced
                self._replaced_in[name] = first
            yield name, text

    def close(self, found: int, expected: str) -> None:
        """Warn of what was wrong.

        Raises:
            DataError: nothing was found; `expected` says what should have been.
        """
        if not found:
            if not self.left_out:
                raise DataError(f"{self.files.path}: expected {expected}, got none; remedy: another source")
            name, problem = next(iter(self.left_out.items()))
            count = len(self.left_out)
            more = f"; all {count} files or lines are broken or empty" if count > 1 else ""
            raise DataError(f"{self.files.where(name)}: {problem}{more}; remedy: mend or replace it")
        if self.left_out:
            named = ", ".join(f"{name} ({problem})" for name, problem in list(self.left_out.items())[:_NAMED])
            more = ", ..." if len(self.left_out) > _NAMED else ""
            _warn(
                f"{self.files.path}: left out {len(self.left_out)} broken or empty files or lines: {named}{more};"
                f" remedy: mend or remove them"
            )
        if self.replaced:
            name, first = next(iter(self._replaced_in.items()))
            count = len(self._replaced_in)
            bad = f"{self.replaced} byte{'s' * (self.replaced > 1)}{f' in {count} files' * (count > 1)}"
            _warn(
                f"{self.files.where(name)}: expected text in UTF-8; {bad} became U+FFFD, the first at offset {first};"
                f" remedy: {_CONVERT}"
            )


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=4)


def open_source(source: str | Path, suffixes: tuple[str, ...], named: str) -> Files:
    """The files of a source.

    Raises:
        DataError: it is not there, or holds no such file; `named` says what else a source may be.
    """
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source}: expected {named}the path of a file or folder, got no such file")
    return Files(path, suffixes)


def records(name: str, text: str, fields: tuple[str, ...], findings: Findings) -> Iterator[tuple[str, ...]]:
    """The fields of each line's JSON object, cleaned; lines without them, or with nothing in them, are left out."""
    wanted = " and ".join(f'"{field}"' for field in fields)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        problem = None
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = f"expected a JSON object with {wanted}, got {str(error).partition(': line')[0]}"
        else:
            if not isinstance(record, dict):
                problem = f"expected a JSON object with {wanted}, got {type(record).__name__}"
            elif not all(isinstance(record.get(field), str) for field in fields):
                got = ", ".join(f'"{key}" ({type(value).__name__})' for key, value in record.items()) or "none"
                problem = f"expected fields {wanted} that are strings, got {got}"
            else:
                values = tuple(clean(record[field]) for field in fields)
                if all(values):
                    yield values
                    continue
                problem = f"expected text in {wanted}, got nothing"
        findings.leave_out(f"{name}:{number}", problem)
