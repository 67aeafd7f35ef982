"""Sizes and memory of upfirdn2d's tensors. Pairs are (vertical, horizontal); padding is (left, right, top, bottom)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from genai_fast.kernels.common.channels import dense_channels
from genai_fast.kernels.common.launch import ceil_div

MOST_TAPS = 64  # that meet a pixel: Triton's kernel is unrolled over them


class Axis(NamedTuple):
    """One dimension of an image: sizes of input and result, factors, what is put before it, taps of the filter."""

    size: int
    out: int
    up: int
    down: int
    before: int
    taps: int

    @property
    def most(self) -> int:
        """Taps that meet a pixel: the others would meet inserted zeros."""
        return ceil_div(self.taps, self.up)


def taps_of(filter: torch.Tensor) -> tuple[int, int]:
    """Of a filter [FH, FW], or [F] for both directions."""
    return (filter.size(0), filter.size(-1))


def output_size(
    plane: Sequence[int], taps: Sequence[int], up: Sequence[int], down: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    """(H up + padding - taps) / down + 1, for each dimension; below 1 if there is no result."""
    left, right, top, bottom = padding
    sizes = zip(plane, taps, up, down, (top + bottom, left + right), strict=True)
    height, width = ((h * u + more - f) // d + 1 for h, f, u, d, more in sizes)
    return height, width


def axes(
    x: torch.Tensor, filter: torch.Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int]
) -> tuple[Axis, Axis]:
    out = output_size(x.shape[2:], taps_of(filter), up, down, padding)
    vertical, horizontal = map(Axis, x.shape[2:], out, up, down, (padding[2], padding[0]), taps_of(filter))
    return vertical, horizontal


def empty_result(x: torch.Tensor, out: Sequence[int]) -> torch.Tensor:
    """Uninitialised [N, C, *out] that lies as a dense x does."""
    last = not x.is_contiguous()
    memory = torch.channels_last if last else torch.contiguous_format
    return torch.empty((*x.shape[:2], *out), dtype=x.dtype, device=x.device, memory_format=memory)


def images(x: torch.Tensor, out: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """(x, an empty result, planes, inner): dense [planes, H, W, inner]; inner: the channels where they lie last."""
    x = dense_channels(x)
    y = empty_result(x, out)
    if x.is_contiguous():
        return x, y, x.size(0) * x.size(1), 1
    return x, y, x.size(0), x.size(1)


def gradient_padding(vertical: Axis, horizontal: Axis) -> tuple[int, int, int, int]:
    """Padding of the upfirdn2d, factors exchanged and filter turned, that leads from a result's gradient to x's."""
    found = []
    for axis in (horizontal, vertical):
        after = axis.size * axis.up - axis.out * axis.down + axis.before - axis.up + 1
        found += [axis.taps - axis.before - 1, after]
    return tuple(found)


def require(
    x: torch.Tensor, filter: torch.Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int]
) -> tuple[Axis, Axis]:
    """The axes. Raises unless kernels, which read by address, can take these; the public op has checked already."""
    fits = x.dim() == 4 and filter.dim() in (1, 2) and filter.numel() and filter.dtype is torch.float32
    fits = fits and filter.device == x.device and len(up) == len(down) == 2 and len(padding) == 4
    found = axes(x, filter, up, down, padding) if fits and min(*up, *down) >= 1 else None
    if found is None or min(axis.out for axis in found) < 1:
        raise ValueError(
            f"upfirdn2d: expected x [N, C, H, W], a filter [FH, FW] or [F] of float32 on its device, factors of at"
            f" least 1 and a result of at least 1 pixel, got {tuple(x.shape)} on {x.device}, {filter.dtype}"
            f" {tuple(filter.shape)} on {filter.device}, up {list(up)}, down {list(down)}, padding {list(padding)}"
        )
    return found
