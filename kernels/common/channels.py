"""Tensors [N, C, ...] as the kernels of channels.h see them: [outer, channels, inner], dense."""

from typing import Any

import torch

from genai_fast.kernels.common.rows import require_alike


def dense_channels(x: torch.Tensor) -> torch.Tensor:
    """x itself if it is contiguous or its channels lie last without holes (any rank), else a contiguous copy."""
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return x
    return x.contiguous()


def like_layout(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """g with the strides of x, which is dense; copies only if it has others."""
    return g if g.stride() == x.stride() else torch.empty_like(x, dtype=g.dtype).copy_(g)


def like_partner(g: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """A gradient or residual with the strides of a dense x. Raises unless it has x's shape, dtype and device."""
    if g is None:
        return None
    require_alike(x, g)
    return like_layout(g, x)


def extent(x: torch.Tensor) -> tuple[int, int, int]:
    """(outer, channels, inner) of a dense x; inner is 1 where the channels lie last."""
    channels = x.size(1)
    if x.is_contiguous():
        outer = x.size(0)
        per_sample = x.numel() // outer if outer else 0
        return outer, channels, per_sample // channels if channels else 0
    return x.numel() // channels, channels, 1


def per_channel(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[C] -> [1, C, 1, ...], to broadcast against x."""
    return p.view(1, -1, *[1] * (x.dim() - 2))


def reduced_dims(x: torch.Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [0, *range(2, x.dim())]


def wide(x: Any) -> Any:
    """A tensor, or None, as statistics and parameters are computed with: in float32, or in float64 if x is."""
    return x if x is None or x.dtype is torch.float32 or x.dtype is torch.float64 else x.float()


def require_channels(
    x: torch.Tensor, *vectors: torch.Tensor | None, dtype: torch.dtype | None = torch.float32
) -> tuple[torch.Tensor | None, ...]:
    """The vectors, contiguous. Raises unless each is None or [C] on x's device and of that dtype.

    Kernels read them by address; the public ops have checked already, with better words.
    """
    channels, place, on_cpu, dense = (x.size(1),), x.get_device(), x.is_cpu, True
    for p in vectors:
        if p is None:
            continue
        # Not by p.device, which costs more than all the rest.
        if p.shape != channels or (dtype and p.dtype is not dtype) or p.is_cpu != on_cpu or p.get_device() != place:
            raise ValueError(
                f"genai_fast: expected {dtype or 'floats'} {channels} on {x.device}, one for each channel,"
                f" got {p.dtype} {tuple(p.shape)} on {p.device}"
            )
        dense = dense and p.is_contiguous()
    return vectors if dense else tuple(p if p is None else p.contiguous() for p in vectors)


def require_bias_and_slopes(
    x: torch.Tensor, bias: torch.Tensor | None, slopes: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """require_channels of both; without a bias, one slope may stand for all channels."""
    if bias is None and slopes is not None and slopes.numel() == 1:
        return None, *require_channels(x[:, :1], slopes)
    return require_channels(x, bias, slopes)


def joined_extent(x: torch.Tensor, by_channel: bool) -> tuple[tuple[int, int, int], int]:
    """extent(x), and how many rows count as one: a few channels that lie last make short rows.

    Joined, `channels` stands for that many copies of them. One plane of one channel unless by_channel.
    """
    if not by_channel:
        return (1, 1, x.numel()), 1
    outer, channels, inner = extent(x)
    joined = max(min(64 // max(channels, 1), outer), 1) if inner == 1 else 1
    while outer % joined:
        joined -= 1
    return (outer // joined, channels * joined, inner), joined
