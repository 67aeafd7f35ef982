"""Moments of tiles, combined in a fixed order (Chan, Golub & LeVeque 1983): no atomics, the same bits in every run.

Partial moments are [3, groups, channels]: count, mean and sum of squared deviations of each group of elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common.launch import ceil_div

GROUPS, CHANNELS, NUM_WARPS = 64, 16, 4  # a tile
MOST_GROUPS = 256  # that one program adds up: more are merged by many programs first


@triton.jit
def _finite(mean):
    """A group's mean to sum the others around: a sum of means themselves would round where they are large."""
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def _combine_moments(
    partial_ptr,                             # [3, groups, channels]
    mean_ptr, squares_ptr, rstd_ptr,         # [channels]
    running_mean_ptr, running_var_ptr,       # [channels] or None
    groups, channels, plane, total, momentum, eps,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean, squared deviations and 1 / sqrt(variance + eps) of each channel; running statistics move by momentum."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    shift = _finite(tl.load(partial_ptr + plane + channel, mask=inside, other=0.0))
    mean = tl.zeros([GROUPS, CHANNELS], tl.float32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        mask = (group < groups)[:, None] & (channel < channels)[None, :]
        at = partial_ptr + group[:, None].to(tl.int64) * channels + channel[None, :]
        count = tl.load(at, mask=mask, other=0.0)
        mean += count / total * (tl.load(at + plane, mask=mask, other=0.0) - shift[None, :])
    mean_c = shift + tl.sum(mean, axis=0)
    squares = tl.zeros([GROUPS, CHANNELS], tl.float32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        mask = (group < groups)[:, None] & (channel < channels)[None, :]
        at = partial_ptr + group[:, None].to(tl.int64) * channels + channel[None, :]
        count = tl.load(at, mask=mask, other=0.0)
        d = tl.where(mask, tl.load(at + plane, mask=mask, other=0.0) - mean_c[None, :], 0.0)
        squares += tl.load(at + 2 * plane, mask=mask, other=0.0) + count * d * d
    squares_c = tl.sum(squares, axis=0)
    tl.store(mean_ptr + channel, mean_c, mask=inside)
    tl.store(squares_ptr + channel, squares_c, mask=inside)
    tl.store(rstd_ptr + channel, 1.0 / tl.sqrt(squares_c / total + eps), mask=inside)
    if running_mean_ptr is not None:
        dtype = running_mean_ptr.dtype.element_ty
        before = tl.load(running_mean_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        after = before * (1.0 - momentum) + mean_c * momentum
        tl.store(running_mean_ptr + channel, after.to(dtype), mask=inside)
        before = tl.load(running_var_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        after = before * (1.0 - momentum) + squares_c / (total - 1.0) * momentum
        tl.store(running_var_ptr + channel, after.to(dtype), mask=inside)


@triton.jit
def _merge_moments(
    partial_ptr,  # [3, groups, channels]
    merged_ptr,  # [3, cdiv(groups, GROUPS), channels]
    groups,
    channels,
    plane,
    merged_plane,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The moments of GROUPS groups together."""
    blocks = tl.cdiv(channels, CHANNELS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    merged = tl.program_id(0) // blocks
    group = merged * GROUPS + tl.arange(0, GROUPS)
    inside = channel < channels
    mask = (group < groups)[:, None] & inside[None, :]
    at = partial_ptr + group[:, None].to(tl.int64) * channels + channel[None, :]
    count = tl.load(at, mask=mask, other=0.0)
    means = tl.load(at + plane, mask=mask, other=0.0)
    total = tl.sum(count, axis=0)
    first = partial_ptr + plane + (merged * GROUPS).to(tl.int64) * channels + channel
    shift = _finite(tl.load(first, mask=inside, other=0.0))
    mean = shift + tl.sum(count / tl.maximum(total, 1.0)[None, :] * (means - shift[None, :]), axis=0)
    d = tl.where(mask, means - mean[None, :], 0.0)
    squares = tl.sum(tl.load(at + 2 * plane, mask=mask, other=0.0) + count * d * d, axis=0)
    out = merged_ptr + merged.to(tl.int64) * channels + channel
    tl.store(out, total, mask=inside)
    tl.store(out + merged_plane, mean, mask=inside)
    tl.store(out + 2 * merged_plane, squares, mask=inside)


def combine_grid(channels):
    """Grid and constants of a last step: all groups of a block of channels by one program."""
    return (ceil_div(channels, CHANNELS),), dict(GROUPS=GROUPS, CHANNELS=CHANNELS, num_warps=NUM_WARPS)


def combine_moments(partial, running_mean, running_var, total, momentum, eps):
    """(mean, squared deviations, 1 / sqrt(variance + eps)) of `total` elements a channel; running statistics move."""
    running = (running_mean, running_var)
    if running_mean is not None:
        running = tuple(r.contiguous() for r in running)
    _, groups, channels = partial.shape
    grid, constants = combine_grid(channels)
    while groups > MOST_GROUPS:
        fewer = ceil_div(groups, GROUPS)
        merged = partial.new_empty((3, fewer, channels))
        _merge_moments[(grid[0] * fewer,)](
            partial, merged, groups, channels, groups * channels, fewer * channels, **constants
        )
        partial, groups = merged, fewer
    results = tuple(partial.new_empty(channels, dtype=torch.float32) for _ in range(3))
    _combine_moments[grid](
        partial, *results, *running, groups, channels, groups * channels, float(total), momentum, eps, **constants
    )
    for given, moved in zip((running_mean, running_var), running, strict=True):
        if moved is not given:
            given.copy_(moved)
    return results
