"""CIFAR-10 as its authors give it (Krizhevsky 2009): binary records, and pickles, which are read, not executed."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genai_fast.data.errors import DataError, brief, listed, printable
from genai_fast.data.images import Images
from genai_fast.data.pickles import DataUnpickler
from genai_fast.data.reading import parsing, read_bytes

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the image
_BATCH = re.compile(r"(data_batch_\d+|test_batch)(\.bin)?")


def is_folder(path: Path) -> bool:
    """Whether a folder holds batches of CIFAR-10."""
    with parsing(path, "a folder that can be read"):
        return any(is_file(file) for file in path.iterdir())


def is_file(path: Path) -> bool:
    """Whether it is called as a batch is, or any .bin file."""
    return path.is_file() and (_BATCH.fullmatch(path.name) is not None or path.suffix == ".bin")


def load(path: Path) -> Images:
    """A file, or a folder's training batches, or its test batch if that is all there is."""
    folder, files = (path, sorted(f for f in path.iterdir() if is_file(f))) if path.is_dir() else (path.parent, [path])
    files = [f for f in files if f.name.startswith("data_batch_")] or files
    kinds = {f.suffix == ".bin" for f in files}
    if len(kinds) > 1:
        raise DataError(f"{path}: expected one version of CIFAR-10, got both .bin and Python batches; remedy: one file")
    binary = kinds.pop()
    classes = _classes(folder, binary)
    pixels, labels = zip(*[(_binary if binary else _python)(f) for f in files], strict=True)
    for file, found in zip(files, labels, strict=True):
        if len(found) and not 0 <= found.min() <= found.max() < len(classes):
            raise DataError(
                f"{file}: expected labels from 0 to {len(classes) - 1}, got {found.min()} to {found.max()};"
                f" remedy: fetch CIFAR-10 again"
            )
    images = np.concatenate(pixels).reshape(-1, *_SHAPE)
    if not len(images):
        raise DataError(f"{path}: expected at least one image, got an empty file; remedy: fetch CIFAR-10 again")
    return Images(path.name, torch.from_numpy(images), torch.from_numpy(np.concatenate(labels)), classes)


def _classes(folder: Path, binary: bool) -> tuple[str, ...]:
    file = folder / ("batches.meta.txt" if binary else "batches.meta")
    if not file.is_file():
        return CLASSES
    if binary:
        with parsing(file, "the names of the classes"):
            names: Any = read_bytes(file).decode("utf-8", "replace").split()
    else:
        names = _get(_unpickle(file), "label_names", file)
    if not isinstance(names, list) or not names or not all(isinstance(name, str | bytes) for name in names):
        raise DataError(f"{file}: expected the names of the classes, got {brief(names)}; remedy: remove it")
    return tuple(printable(name.decode("latin1") if isinstance(name, bytes) else name) for name in names)


def _binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with parsing(file, "CIFAR-10"):
        raw = np.frombuffer(read_bytes(file), np.uint8)
    if raw.size % _RECORD:
        raise DataError(
            f"{file}: expected CIFAR-10, {_RECORD} bytes an image, got {raw.size} bytes; remedy: fetch it again"
        )
    records = raw.reshape(-1, _RECORD)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _python(file: Path) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickle(file)
    data, labels = _get(batch, "data", file), _get(batch, "labels", file)
    pixels = data.bytes() if isinstance(data, _Array) else None
    if pixels is None or pixels.size % (_RECORD - 1):
        got = "something else" if pixels is None else f"{pixels.size} bytes"
        raise DataError(f"{file}: expected an array of bytes, 3072 an image, got {got}; remedy: fetch CIFAR-10 again")
    count = pixels.size // (_RECORD - 1)
    right = isinstance(labels, list) and len(labels) == count and all(type(k) is int and abs(k) < 256 for k in labels)
    if not right:
        raise DataError(f"{file}: expected {count} labels, integers, got {brief(labels)}; remedy: fetch CIFAR-10 again")
    return pixels.reshape(count, _RECORD - 1), np.array(labels, np.int64)


def _get(batch: Any, key: str, file: Path) -> Any:
    # Written by Python 2, its strings are bytes.
    found = batch.get(key, batch.get(key.encode())) if isinstance(batch, dict) else None
    if found is None:
        got = listed(batch) if isinstance(batch, dict) else type(batch).__name__
        raise DataError(f"{file}: expected a CIFAR-10 batch with {key}, got {got}; remedy: fetch it again")
    return found


class _Dtype:
    """In the place of numpy.dtype: its code, such as u1."""

    def __init__(self, code: str | bytes, *flags: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """In the place of numpy.ndarray: what it is made from. NumPy itself trusts what a pickle says of an array."""

    def __init__(self, *arguments: object) -> None:
        self.dtype, self.raw = None, None

    def __setstate__(self, state: tuple) -> None:
        _version, _shape, self.dtype, in_columns, raw = state
        self.raw = None if in_columns else raw

    def bytes(self) -> np.ndarray | None:
        """Its elements, flat, or None if it is no array of bytes."""
        whole = isinstance(self.dtype, _Dtype) and self.dtype.code == "u1" and isinstance(self.raw, bytes | bytearray)
        return np.frombuffer(self.raw, np.uint8) if whole else None


class _Buffer(_Array):
    """In the place of NumPy's _frombuffer, which protocol 5 calls."""

    def __init__(self, raw: object, dtype: object, shape: object, order: object) -> None:
        self.dtype, self.raw = dtype, raw if order == "C" else None


class _Bytes(bytes):
    """In the place of _codecs.encode, which makes bytes for protocols before 3."""

    def __new__(cls, text: str, encoding: str) -> _Bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes in {brief(encoding)}")
        return super().__new__(cls, text, "latin1")

    def __setstate__(self, state: object) -> None:
        pass


_ADMITTED: dict[tuple[str, str], type] = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype}
_ADMITTED |= {(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")}
_ADMITTED |= {(f"numpy.{core}.numeric", "_frombuffer"): _Buffer for core in ("core", "_core")}
_ADMITTED |= {("_codecs", "encode"): _Bytes}


class _Reader(DataUnpickler):
    """Containers, strings, numbers and arrays; nothing that a file names is imported or called."""

    def find_class(self, module: str, name: str) -> type:
        return _ADMITTED.get((module, name)) or super().find_class(module, name)


def _unpickle(file: Path) -> Any:
    expected = "a CIFAR-10 batch of arrays, lists and numbers"
    with parsing(file, expected, "fetch it again, or the binary version"):
        return _Reader(read_bytes(file), encoding="bytes").load()
