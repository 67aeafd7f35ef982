""".npy and .npz files of plain arrays: only what is asked for is read, and no size in a header is trusted."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from genai_fast.data.archive import Archive
from genai_fast.data.errors import DataError, listed
from genai_fast.data.reading import open_regular, parsing

_EXPECTED = "a NumPy file without pickled objects"
_MAGIC = b"\x93NUMPY"


def read_arrays(path: Path, *groups: Sequence[str]) -> list[np.ndarray | None]:
    """For each group of names the array of an .npz that has the first of them, or None.

    An .npy holds the first group's.

    Raises DataError: the file is broken, or has nothing of the first group.
    """
    with parsing(path, _EXPECTED):
        with open_regular(path) as file:
            if file.read(len(_MAGIC)) == _MAGIC:
                raw = bytearray(os.fstat(file.fileno()).st_size)
                file.seek(0)
                file.readinto(raw)
                return [_array(raw), *[None] * (len(groups) - 1)]
        named, seen = {f"{name}.npy" for group in groups for name in group}, list[str]()
        archive = Archive(path, lambda name: seen.append(name.removesuffix(".npy")) or name in named, _EXPECTED)
        chosen = [next((name for name in group if f"{name}.npy" in archive.names), None) for group in groups]
        if chosen[0] is None:
            raise DataError(
                f"{path}: expected an array named {' or '.join(groups[0])}, got {listed(seen)}; remedy: rename it"
            )
        return [name and _array(bytearray(archive.read(f"{name}.npy"))) for name in chosen]


def _array(raw: bytearray) -> np.ndarray:
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):  # later ones are of structured types
        raise ValueError(f"version {version} of the format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, in_columns, dtype = read(file)
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"an array of {dtype}")
    body, count = len(raw) - file.tell(), math.prod(shape)
    if min(shape, default=1) < 0 or count * dtype.itemsize > body:
        raise ValueError(f"{body} bytes for shape {shape} of {dtype}")
    flat = np.frombuffer(raw, dtype, count, file.tell())  # a bytearray's: it may be written
    return flat.reshape(shape, order="F" if in_columns else "C")
