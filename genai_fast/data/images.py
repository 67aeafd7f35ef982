"""A set of images in memory or in a mapped file; a seeded split, a resumable epoch order, batches."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from genai_fast.cpu import allowed_cores
from genai_fast.data.augment import Augment
from genai_fast.data.errors import DataError

_AT_ONCE = 1000  # images resized at a time
_BLOCK = 1 << 24  # bytes that one thread hashes


@dataclass(frozen=True)
class Images:
    """A set of images of one size.

    stored: [M, C, H, W], uint8 (0 to 255) or float32 in [0, 1]; may be a mapped file.
    labels: [N] int64, of the set's images in their order, or None.
    classes: the name of each label.
    skipped: the names of files that were left out because they are broken.
    index: [N] int64, the rows of `stored` that make up the set, in order; None: all of them (N = M).
    content: array_digest of `stored` if it is known.
    names: of the files that the set's images are from, in their order, as paths below its folder; (): not known.
    """

    name: str
    stored: torch.Tensor
    labels: torch.Tensor | None = None
    classes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    index: torch.Tensor | None = None
    content: str = ""
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.stored if self.index is None else self.index)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.stored.shape[1:])

    @property
    def pixels(self) -> torch.Tensor:
        """The set's own images, [N, C, H, W], as they are stored: a copy where the set is a part of `stored`."""
        return self.stored if self.index is None else self.stored[self.index]

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the pixels and labels in their order, not of name or place.

        The first time it reads all of `stored` unless `content` is known, as it is of folders and zip files.
        """
        parts = [self.content or array_digest(self.stored.numpy())]
        parts += ["" if part is None else array_digest(part.numpy()) for part in (self.labels, self.index)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def batch(self, index: torch.Tensor | slice, *, signed: bool = False) -> torch.Tensor:
        """The chosen images, [B, C, H, W] float32, contiguous, in [0, 1], or in [-1, 1] with `signed`."""
        rows = index if self.index is None else self.index[index]
        numbers = isinstance(rows, torch.Tensor) and rows.dtype == torch.int64
        x = self.stored.index_select(0, rows) if numbers else self.stored[rows]  # the former takes a sixth of the time
        if x.dtype == torch.uint8:
            x = x.float().div_(127.5 if signed else 255.0)  # 255 becomes 2 or 1 exactly
            return x.sub_(1.0) if signed else x
        return to_signed(x) if signed else x.contiguous()

    def subset(self, index: torch.Tensor) -> Images:
        """The images of these numbers, in this order; shares `stored`, so a mapped file stays one."""
        labels = None if self.labels is None else self.labels[index]
        names = tuple(self.names[k] for k in index.tolist()) if self.names else ()
        return replace(self, labels=labels, names=names, index=index if self.index is None else self.index[index])

    def in_colour(self) -> Images:
        """The same in RGB; grey images get three equal channels."""
        if self.shape[0] == 3:
            return self
        return replace(self, stored=self.pixels.expand(-1, 3, -1, -1).contiguous(), index=None, content="")

    def resized(self, size: int) -> Images:
        """The centre square of each image scaled to `size` x `size`, in memory; bilinear, antialiased."""
        if size < 1:
            raise DataError(f"size: expected at least 1 pixel, got {size}")
        height, width = self.shape[1:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        if height == width == size:
            return self
        square = self.pixels[:, :, top : top + side, left : left + side]
        parts = [
            F.interpolate(part.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
            for part in square.split(_AT_ONCE)
        ]
        if square.dtype == torch.uint8:
            parts = [part.round_().byte() for part in parts]
        return replace(self, stored=torch.cat(parts), index=None, content="")

    def split(self, fraction: float, seed: int) -> tuple[Images, Images]:
        """(training, validation): a random `fraction` of the images, fixed by the seed, is held out."""
        held_out = round(fraction * len(self))
        if not 0 < held_out < len(self):
            raise DataError(
                f"{self.name}: expected enough images to hold out {fraction:g} of them, got {len(self)};"
                f" remedy: more images, or another share (--validation)"
            )
        order = permutation(len(self), seed)
        return self.subset(order[held_out:]), self.subset(order[:held_out])


def array_digest(array: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and elements in C order; of its blocks in threads, about 1 GB/s per core."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    blocks = (flat[start : start + _BLOCK] for start in range(0, len(flat), _BLOCK))
    with ThreadPoolExecutor(allowed_cores()) as pool:
        parts = pool.map(lambda block: hashlib.sha256(block).digest(), blocks)
        return hashlib.sha256(f"{array.dtype.str} {array.shape}".encode() + b"".join(parts)).hexdigest()


def to_signed(x: torch.Tensor) -> torch.Tensor:
    """[0, 1] to [-1, 1]."""
    return torch.mul(x, 2.0).sub_(1.0)


def permutation(count: int, *key: int) -> torch.Tensor:
    # NumPy mixes the whole key; torch's CPU generator would use the low 32 bits of one number only.
    return torch.from_numpy(np.random.default_rng(key).permutation(count))


def epoch_order(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of `count` samples in an epoch, [count] int64: a function of (seed, epoch) alone."""
    # One number more than the split's key, so that the two never share a permutation.
    return permutation(count, seed, epoch + 1)


def batches(
    images: Images,
    size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    *,
    signed: bool = False,
    labels: bool = False,
    augment: Augment | None = None,
    whole: bool = False,
    rows: Callable[[int], torch.Tensor] | None = None,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """An epoch's batches from number `start` on.

    Args:
        images: where they come from.
        size: images a batch; the epoch's last batch may be smaller.
        seed, epoch: decide the order and, with the batch's number, the augmentation.
        signed: in [-1, 1] instead of [0, 1].
        labels: with the labels.
        augment: what is done to each image at random.
        whole: leave a smaller last batch out.
        rows: number of a batch's images -> [B] int64, which of them to give, as they are in the whole; None: all.

    Returns: An iterator over (x,) or (x, labels): x [B, C, H, W] float32, labels [B] int64.
    Raises DataError: there are no labels, or fewer images than a whole batch; at the call, not at the first batch.
    """
    if labels and images.labels is None:
        raise DataError(
            f"{images.name}: expected images with labels, got none; remedy: one subfolder for each class, or no classes"
        )
    if whole and len(images) < size:
        raise DataError(
            f"{images.name}: fewer images than a batch: expected at least {size} images, got {len(images)};"
            f" remedy: a smaller --batch-size"
        )
    return _batches(images, size, seed, epoch, start, signed, labels, augment, whole, rows)


def _batches(
    images: Images, size: int, seed: int, epoch: int, start: int, signed: bool, labels: bool, augment: Augment | None,
    whole: bool, rows: Callable[[int], torch.Tensor] | None,
) -> Iterator[tuple[torch.Tensor, ...]]:  # fmt: skip
    order = epoch_order(len(images), seed, epoch)
    end = len(images) // size * size if whole else len(images)
    for number, first in enumerate(range(start * size, end, size), start):
        chosen, taken = order[first : min(first + size, end)], None
        if rows:
            taken = len(chosen), rows(len(chosen))
            chosen = chosen[taken[1]]
        if augment:
            x = augment(images.batch(chosen), seed, epoch, number, taken)
            x = to_signed(x) if signed else x
        else:
            x = images.batch(chosen, signed=signed)
        yield (x, images.labels[chosen]) if labels else (x,)
