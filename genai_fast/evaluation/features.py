"""Features of images from a fixed random network: what the distances of this package are taken between.

Random embeddings tell sets of images apart where the features of an ImageNet classifier mean little, as on digits
(Naeem et al. 2020, arXiv:2002.09797, sec. 3.3), and need no weights from elsewhere. Distances in these features rank
sets of images against each other; they are not those of Inception features.
"""

import contextlib
import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from genai_fast.precision import float32_products

VERSION = 1  # of the features; whatever changes their values raises it
DIMENSIONS = 104  # deviations of 16 + 24 + 32 maps, and means of the last 32

_WIDTHS = (16, 24, 32)
_SIDES = (32, 64)  # pixels: the smaller serves images up to its size
_MEAN_WEIGHT = 0.25  # of the first filter of a layer, which averages; brightness would drown the rest
_SCALE = 10.0  # of the features: distances between halves of a data set are then about 0.01 to 1
_SEED = 0
_BATCH = 128  # images at once: some 100 MiB at 64 pixels
_TOLERANCE = 1e-3  # how far pixels may leave [0, 1] by rounding


@torch.no_grad()
def image_features(images: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """The features of images: how strong, how uneven and how frequent patterns of three sizes are.

    Images are resized, antialiased, to 32 x 32 pixels, or to 64 x 64 if a side exceeds 32; grey becomes three equal
    channels. Three times then: a 3 x 3 convolution with orthonormal filters, its absolute value, and (but for the last)
    averages of 2 x 2. Filters have mean 0, but the first of a layer, which averages. The features are each map's
    standard deviation over the image and the last maps' means.

    Args:
        images: [N, C, H, W] in [0, 1], C 1 or 3, H and W from 8 to 256, any floating dtype.
        device: where to compute; None: where the images are.

    Returns: [N, DIMENSIONS] float32 on that device, without gradient; computed in float32 (no TF32, no autocast) and a
        few images at a time. Equal for every batch and PyTorch version up to rounding.
    Raises ValueError: another shape, or pixels that are not in [0, 1]. TypeError: another dtype.
    """
    _check(images)
    device = images.device if device is None else torch.device(device)
    if not len(images):
        return torch.empty(0, DIMENSIONS, device=device, dtype=torch.float32)
    filters = [w.to(device) for w in _filters()]
    side = _SIDES[max(images.shape[2:]) > _SIDES[0]]
    with torch.autocast(device.type, enabled=False), float32_products(), _repeatable():
        parts = [_forward(part.to(device, torch.float32), filters, side) for part in images.split(_BATCH)]
    return torch.cat(parts)


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """Convolutions the same in every run."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark, cudnn.deterministic = False, True
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def _forward(x: torch.Tensor, filters: list[torch.Tensor], side: int) -> torch.Tensor:
    if x.shape[2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)
    x = 2.0 * x.expand(-1, 3, -1, -1) - 1.0
    found = []
    for layer, weight in enumerate(filters):
        x = F.avg_pool2d(x, 2) if layer else x
        # Repeating the border adds no edge of its own. |.| keeps the second moment, as the filters do.
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight).abs()
        # Deviations rather than variances: some images' contrast is many times others'.
        found.append(x.var((2, 3), correction=0).sqrt())
    return _SCALE * torch.cat([*found, x.mean((2, 3))], dim=1)


@functools.cache
def _filters() -> tuple[torch.Tensor, ...]:
    """The weights [out, in, 3, 3], float32 on the CPU."""
    bits, given, filters = np.random.Philox(_SEED), 3, []
    for made in _WIDTHS:
        size = given * 9
        rows = _normal(bits, made * size).reshape(made, size)
        basis, triangle = np.linalg.qr((rows - rows.mean(1, keepdims=True)).T)
        rows = (basis * np.sign(np.diag(triangle))).T  # LAPACKs differ in the signs
        rows[0] = _MEAN_WEIGHT / math.sqrt(size)
        filters.append(torch.from_numpy(rows.reshape(made, given, 3, 3).astype(np.float32)))
        given = made
    return tuple(filters)


def _normal(bits: np.random.Philox, count: int) -> np.ndarray:
    """Normal numbers [count] by Box and Muller from the generator's bits: NumPy keeps those the same in every version,
    but not the numbers that it makes of them."""
    uniform = ((bits.random_raw(2 * count) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    return np.sqrt(-2.0 * np.log(uniform[:count])) * np.cos(2.0 * np.pi * uniform[count:])


def _check(images: torch.Tensor) -> None:
    if not images.is_floating_point():
        raise TypeError(
            f"image_features: images: expected a floating dtype, got {images.dtype}; remedy: images.float() / 255"
        )
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not all(8 <= s <= 256 for s in images.shape[2:]):
        raise ValueError(
            f"image_features: images: expected [N, C, H, W] with C 1 or 3, H and W from 8 to 256,"
            f" got {list(images.shape)}; remedy: reshape or resize them"
        )
    if not images.numel():
        return
    low, high = (float(v) for v in images.aminmax())
    if not (low >= -_TOLERANCE and high <= 1.0 + _TOLERANCE):  # NaN fails too
        raise ValueError(
            f"image_features: images: expected pixels in [0, 1], got {low:g} to {high:g};"
            f" remedy: (images + 1) / 2 for a tanh generator's, else images.clamp(0, 1)"
        )
