"""The weights of a WaveNet as one list, as the decoder reads them, and what they must be."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

LAYER = 4  # tensors of a layer: taps [K, C, 2 C], skip [C, S], residual [C, C] and its bias (nothing in the last layer)
LAST = 5  # the skips' bias [S], head [S, S] and bias, logits [S, V] and bias; the embedding [V, C] comes first
_VECTOR = 16  # floats, of the widest instruction set: rows of matrices are padded to whole ones


class Sizes(NamedTuple):
    """Of a model: levels of a sample, channels, channels of the skips, layers, taps; positions that the cache holds."""

    levels: int
    width: int
    skip: int
    layers: int
    kernel: int
    room: int


def whole(columns: int) -> int:
    """Columns, with those that pad them."""
    return columns + -columns % _VECTOR


def padded(x: torch.Tensor) -> torch.Tensor:
    """x with zeros up to whole vectors in its last dimension, dense."""
    return F.pad(x, (0, -x.size(-1) % _VECTOR)).contiguous()


def expected(size: Sizes) -> list[tuple[int, ...]]:
    """The shape of each tensor of the list."""
    width, skip = size.width, size.skip
    layer = [(size.kernel, width, whole(2 * width)), (width, whole(skip)), (width, whole(width)), (whole(width),)]
    layers = [shape for _ in range(size.layers) for shape in layer]
    layers[-2:] = [(0,), (0,)]
    last = [(whole(skip),), (skip, whole(skip)), (whole(skip),), (skip, whole(size.levels)), (whole(size.levels),)]
    return [(size.levels, width), *layers, *last]


def require(
    codes: torch.Tensor, cache: torch.Tensor, given: int, start: int, uniforms: torch.Tensor, condition: torch.Tensor,
    weights: Sequence[torch.Tensor], dilations: Sequence[int],
) -> Sizes:  # fmt: skip
    """Raise unless all fits: kernels read by address. See `ops.wavenet_decode` for what the arguments are."""
    layers, count = len(dilations), 1 + LAYER * len(dilations) + LAST
    if layers < 1 or min(dilations) < 1 or len(weights) != count or weights[0].dim() != 2 or weights[1].dim() != 3:
        raise ValueError(
            f"wavenet_decode: weights: expected {count} tensors for {layers} dilations of at least 1, got"
            f" {len(weights)}; WaveNetDecoder makes the list"
        )
    kernel, dtype = weights[1].size(0), torch.float64 if cache.dtype is torch.float64 else torch.float32
    (levels, width), skip = weights[0].shape, weights[-LAST + 1].size(0)
    size = Sizes(levels, width, skip, layers, kernel, (kernel - 1) * sum(dilations))
    batch, steps = codes.size(0), codes.size(-1) - 1
    tensors = [
        ("cache", cache, (batch, size.room, width)), ("uniforms", uniforms, (batch, steps)),
        ("condition", condition, (layers, batch, 2 * width)),
        *((f"weights: number {k}", w, s) for k, (w, s) in enumerate(zip(weights, expected(size), strict=True))),
    ]  # fmt: skip
    for name, x, shape in tensors:
        if x.shape != shape or x.dtype is not dtype or x.device != codes.device or not x.is_contiguous():
            raise ValueError(
                f"wavenet_decode: {name}: expected contiguous {dtype} {shape} on {codes.device}, got {x.dtype}"
                f" {tuple(x.shape)} on {x.device}"
            )
    if codes.dtype is not torch.int64 or codes.dim() != 2 or not codes.is_contiguous() or steps < 1:
        raise ValueError(
            f"wavenet_decode: codes: expected contiguous torch.int64 [B, T + 1], T >= 1, got {codes.dtype}"
            f" {tuple(codes.shape)}"
        )
    if not 1 <= given <= steps + 1 or start < 0:
        raise ValueError(
            f"wavenet_decode: given, start: expected 1 to {steps + 1} and at least 0, got {given} and {start}"
        )
    return size
