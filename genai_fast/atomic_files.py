"""Files that are whole or not there at all, whenever the process dies."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from genai_fast.errors import UsageError, require

if TYPE_CHECKING:
    import torch

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A hidden path beside `path`, at which to write a file or make a folder; it takes the place of `path` at the end.

    At no time half of it has that name. If the body raises, the hidden file is removed and the old one stays.
    A folder takes the place of nothing or of an empty one.

    Raises OSError: it cannot be written; the old one stays.
    """
    # A name that no other process has, and at which no link to write through can have been placed.
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        yield hidden
        for written in (*hidden.rglob("*"), hidden) if hidden.is_dir() else (hidden,):
            synchronize(written)
        os.replace(hidden, path)
    except BaseException as error:
        discard(hidden)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(hidden)):
            error.filename = str(path)
        raise
    synchronize(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all."""
    with whole(path) as hidden:
        hidden.write_text(text, encoding="utf-8")


def check_vacant(out: Path) -> None:
    """Raises UsageError unless `out`, of a flag --out, is no file and no folder with something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out: expected a new or empty folder, got {out}; remedy: another name")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, this process alone writes into the folder; on a file system without locks nothing ensures it.

    First removes what writers that were killed have left.

    Raises UsageError: another process is inside. The lock of one that dies goes with it.
    """
    descriptor = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        if descriptor is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"{folder}: another process trains in it; remedy: wait for its end, or another name with --run"
                ) from None
            except OSError:  # a network's
                pass
        for left in folder.glob(".*.new"):
            discard(left)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file of contiguous tensors on the CPU.

    Raises: OSError.
    """
    write, error_of = require("safetensors.torch", "train").save_file, require("safetensors", "train").SafetensorError
    try:
        write(tensors, path, {"format": "pt"})
    except error_of as error:
        number = re.search(r"os error (\d+)", str(error))
        reason = (int(number[1]), os.strerror(int(number[1]))) if number else (errno.EIO, str(error))
        raise OSError(*reason, str(path)) from error


class Damaged(ValueError):
    """A file's contents are not what was written."""


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        Damaged: it is missing or not a whole file of this kind.
        OSError: it cannot be read (permissions, descriptors, memory, the disk).
    """
    safetensors = require("safetensors", "train")
    if not path.is_file():
        raise Damaged("something else" if path.exists() else "no such file")
    with open(path, "rb"):  # safetensors says of whatever it cannot open that it does not exist
        pass
    try:
        with safetensors.safe_open(path, "pt") as file:
            # Copies: safetensors maps the file, which a run of several days would hold open.
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except safetensors.SafetensorError as error:
        raise Damaged(str(error)) from error


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def synchronize(path: Path) -> None:
    """fsync a file or a folder."""
    if os.name == "nt" and path.is_dir():  # Windows has no such call
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Take away a folder with all that is in it, a file, or a link but not what it points to; or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def room(path: Path) -> str:
    """How much is free on the disk that holds `path`, in words."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    while not place.is_mount():
        place = place.parent
    return f"{free / 1e6:,.1f} MB free on the disk at {place}"
