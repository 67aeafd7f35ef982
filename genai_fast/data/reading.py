"""Reading files that may be anything: regular files alone, bounded in what they unpack to, errors of one kind."""

import contextlib
import gzip
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from genai_fast.data.errors import DataError, reason
from genai_fast.errors import UsageError

# What packed data may unpack to: this much, or this many times its size. Compressed text is 3 to 20 times smaller, and
# dSprites, an extreme of real data, 115 times; deflate reaches 1,032.
_ALWAYS, _RATIO = 1 << 28, 150
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # a pipe without a writer; there is no such flag on Windows
_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


@contextlib.contextmanager
def parsing(where: str | Path, expected: str, remedy: str = "fetch it again") -> Iterator[None]:
    """Inside, whatever a parser raises of a file becomes one DataError; a file that cannot be read is not damaged."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # else a parser's own
            remedy = "a file that can be read"
        raise DataError(f"{where}: expected {expected}, got {reason(error)}; remedy: {remedy}") from error


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file to read its bytes; a pipe or a device, which could wait or give bytes forever, is refused.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file; the message says what it is.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_WAIT))  # noqa: SIM115
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise ValueError(_KINDS.get(stat.S_IFMT(mode), "no regular file"))
    return file


def read_bytes(path: str | Path) -> bytes:
    """All of a regular file. Raises: as open_regular."""
    with open_regular(path) as file:
        return file.read()


def is_folder(source: str | Path, expected: str) -> bool:
    """Whether a source is a folder, else a file. Raises DataError: it is not there, or cannot be looked at."""
    try:
        return stat.S_ISDIR(os.stat(source).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{source}: expected {expected}, got no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: expected {expected}, got {reason(error)}") from error


def check_unpacked(size: int, packed: int) -> None:
    """Raises ValueError if data of `packed` bytes may not unpack to `size`."""
    if size > max(_ALWAYS, _RATIO * packed):
        raise ValueError(f"{packed} bytes that unpack to {size}, over {_RATIO} times as many")


def gunzip(raw: bytes) -> bytes:
    """Unpack gzip's format, bounded. Raises: what gzip raises; ValueError if it unpacks to too much."""
    most = max(_ALWAYS, _RATIO * len(raw))
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
        found = file.read(most + 1)
    check_unpacked(len(found), len(raw))
    return found


def hidden(name: str) -> bool:
    """Whether a file, or a folder that it is in, is hidden or is what macOS adds to zip files."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
