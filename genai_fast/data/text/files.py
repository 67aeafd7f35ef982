"""The files of a source (one, a folder's, a zip's), and what was wrong with them."""

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from genai_fast.data.archive import Archive
from genai_fast.data.errors import DataError, DataWarning, listed, printable, reason
from genai_fast.data.reading import hidden, is_folder, read_bytes
from genai_fast.data.text.cleaning import UnreadableError, clean, decode

_NAMED = 3  # what was left out that a warning names
_CONVERT = "save it as UTF-8 (iconv -f ENCODING -t utf-8)"


class Files:
    """The files of a source by name, in order; hidden ones are left out.

    Args:
        path: a file, which always counts; a folder, searched with all below it; or a .zip file of such.
        suffixes: of the files in a folder or zip that count.
    """

    def __init__(self, path: Path, suffixes: tuple[str, ...]) -> None:
        self.path = self._base = path
        self._zip: Archive | None = None
        if is_folder(path, "the path of a file or folder"):
            names = [name for name in _below(path) if name.lower().endswith(suffixes)]
        elif path.suffix.lower() == ".zip":
            self._zip = Archive(path, lambda name: not hidden(name) and name.lower().endswith(suffixes))
            names = self._zip.names
        else:
            self._base, self.names = path.parent, [path.name]
            return
        self.names = sorted(names)
        if not self.names:
            wanted = ", ".join(suffixes)
            raise DataError(
                f"{path}: expected files ({wanted}) in it or in its subfolders, got none; remedy: another folder"
            )

    def where(self, name: str) -> str:
        """A file's path for messages."""
        return str(self._base / name)

    def close(self) -> None:
        """Close the zip file, if it is one."""
        if self._zip is not None:
            self._zip.close()

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises UnreadableError: it cannot be read."""
        try:
            return read_bytes(self._base / name) if self._zip is None else self._zip.read(name)
        except Exception as error:  # as many as there are ways to damage a zip file
            raise UnreadableError(f"expected text, got {reason(error)}") from error


def _below(path: Path) -> Iterator[str]:
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not hidden(name)]
        under = Path(folder).relative_to(path)
        yield from ((under / name).as_posix() for name in names if not hidden(name))


@dataclass
class Findings:
    """What was wrong: raised at once if strict, else counted, and warned of once at the end."""

    files: Files
    strict: bool
    left_out: dict[str, str] = field(default_factory=dict)  # name, or "name:line" -> expected and got
    replaced: int = 0
    _replaced_in: dict[str, int] = field(default_factory=dict)  # name -> offset of the first one

    @property
    def skipped(self) -> tuple[str, ...]:
        """What was left out, in names that are safe to print."""
        return tuple(map(printable, self.left_out))

    def leave_out(self, name: str, problem: str) -> None:
        """A file or a line does not serve; `problem` is "expected X, got Y"."""
        if self.strict:
            raise DataError(f"{self.files.where(name)}: {problem}; remedy: repair or remove it")
        self.left_out[name] = problem

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Inside, whatever is raised of a file leaves it out."""
        try:
            yield
        except DataError:
            raise
        except UnreadableError as error:
            self.leave_out(name, str(error))
        except Exception as error:  # as many as parsers have
            self.leave_out(name, f"expected text, got {reason(error)}")

    def texts(self, charset: Callable[[str, bytes], str]) -> Iterator[tuple[str, str]]:
        """(name, text) of each file that can be read.

        Args:
            charset: given a file's name and bytes, the encoding that it states itself, or "".
        """
        for name in self.files.names:
            text = None
            with self.reading(name):
                raw = self.files.read(name)
                text, replaced, first = decode(raw, charset(name, raw))
            if text is None:
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
        """Close the files and warn of what was wrong.

        Raises DataError: nothing was found; `expected` says what should have been.
        """
        self.files.close()
        if not found:
            if not self.left_out:
                raise DataError(f"{self.files.path}: expected {expected}, got none; remedy: another source")
            name, problem = next(iter(self.left_out.items()))
            count = len(self.left_out)
            more = f"; all {count} files or lines are broken or empty" if count > 1 else ""
            raise DataError(f"{self.files.where(name)}: {problem}{more}; remedy: repair or replace it")
        if self.left_out:
            named = ", ".join(f"{name} ({problem})" for name, problem in list(self.left_out.items())[:_NAMED])
            more = ", ..." if len(self.left_out) > _NAMED else ""
            _warn(
                f"{self.files.path}: left out {len(self.left_out)} broken or empty files or lines: {named}{more};"
                f" remedy: repair or remove them"
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

    Raises DataError: it is not there, or holds no such file; `named` says what else a source may be.
    """
    is_folder(source, f"{named}the path of a file or folder")
    return Files(Path(source), suffixes)


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
            problem = f"expected a JSON object with {wanted}, got {reason(error).partition(': line')[0]}"
        else:
            if not isinstance(record, dict):
                problem = f"expected a JSON object with {wanted}, got {type(record).__name__}"
            elif not all(isinstance(record.get(field), str) for field in fields):
                got = listed(f'"{key}" ({type(value).__name__})' for key, value in record.items())
                problem = f"expected fields {wanted} that are strings, got {got}"
            else:
                values = tuple(clean(record[field]) for field in fields)
                if all(values):
                    yield values
                    continue
                problem = f"expected text in {wanted}, got nothing"
        findings.leave_out(f"{name}:{number}", problem)
