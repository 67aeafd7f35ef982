"""bias_act on the GPU: [rows, columns] with all channels a row where they lie last, else one channel's plane a row."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common.activations import code_beside
from genai_fast.kernels.common.activations_triton import (
    activate,
    times_derivative,
    times_derivative_by_slope,
    times_derivative_from_output,
)
from genai_fast.kernels.common.channels import dense_channels, joined_extent, like_layout, require_bias_and_slopes
from genai_fast.kernels.common.launch import ceil_div, row_tile
from genai_fast.kernels.common.rows import require_alike
from genai_fast.kernels.common.tuned import launch

ELEMENTS = 1024  # a step of a program: 8 elements a thread
NUM_WARPS = 4
MOST_LAST = 64  # columns where all are channels: the rows of a program read the bias once, which is twice as large
PROGRAMS = 1024  # that share the rows of a channel sum: enough for every GPU, few enough to add up


@triton.jit
def _tile(group, split, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [1, BLOCK], offsets and mask [ROWS, BLOCK]."""
    row = (group.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]  # rows * columns passes 2**31
    column = (split.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    return column, row * columns + column, (row < rows) & (column < columns)


@triton.jit
def _spread(vector_ptr, group, column, mask, channels, LAST: tl.constexpr, JOINED: tl.constexpr, ROWS: tl.constexpr):
    """What a vector by channel has for each element, [ROWS, BLOCK] or [ROWS, 1]."""
    if LAST:
        channel = column.to(tl.int32) % channels if JOINED else column
        # In the shape of the tile: else a thread would hold other columns of it.
        values = tl.load(vector_ptr + tl.broadcast_to(channel, mask.shape), mask=mask, other=0.0)
    else:
        channel = ((group % channels) * ROWS + tl.arange(0, ROWS)) % channels
        values = tl.load(vector_ptr + channel)[:, None]
    return values


@triton.jit(do_not_specialize=["units"])
def _bias_act_forward(
    x_ptr, y_ptr,                            # [rows, columns]
    bias_ptr, slopes_ptr,                    # [channels] or None
    rows, units, channels, splits, slope,    # columns = units * UNIT: what a thread may load at once
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, JOINED: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = activate(x + bias[c])."""
    group, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    columns = units.to(tl.int64) * UNIT
    column, offs, mask = _tile(group, split, rows, columns, ROWS, BLOCK)
    z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += _spread(bias_ptr, group, column, mask, channels, LAST, JOINED, ROWS)
    if slopes_ptr is not None:
        slope = _spread(slopes_ptr, group, column, mask, channels, LAST, JOINED, ROWS)
    y = activate(z, slope, ACTIVATION, y_ptr.dtype.element_ty != tl.float32)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(
    partial_ptr, total, first, split, splits, rows, columns, LAST: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if LAST:
        column = split.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(partial_ptr + first.to(tl.int64) * columns + column, tl.sum(total, axis=0), mask=column < columns)
    else:
        row = first.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(partial_ptr + row * splits + split, tl.sum(total, axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["units"])
def _bias_act_backward(
    grad_y_ptr, saved_ptr,                   # [rows, columns]: saved is y if FROM_OUTPUT, else x
    bias_ptr, slopes_ptr, grad_x_ptr,        # [channels] or None, twice, [rows, columns]
    partial_ptr, slopes_partial_ptr,         # [programs / splits, columns] if LAST, else [rows, splits]; or None
    rows, units, channels, splits, slope,
    ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr, STEPS: tl.constexpr, LAST: tl.constexpr,
    JOINED: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = dy act'(x + bias), and its sums and those of prelu's slopes over this program's rows or columns.

    STEPS is 1 unless LAST.
    """
    first, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    columns = units.to(tl.int64) * UNIT
    NARROW: tl.constexpr = grad_x_ptr.dtype.element_ty != tl.float32
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    by_slope = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(STEPS):
        group = first * STEPS + step
        column, offs, mask = _tile(group, split, rows, columns, ROWS, BLOCK)
        grad = tl.load(grad_y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(saved_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if FROM_OUTPUT:
            grad = times_derivative_from_output(grad, z, slope, ACTIVATION, NARROW)
        else:
            if bias_ptr is not None:
                z += _spread(bias_ptr, group, column, mask, channels, LAST, JOINED, ROWS)
            if slopes_ptr is not None:
                own = _spread(slopes_ptr, group, column, mask, channels, LAST, JOINED, ROWS)
                by_slope += tl.where(mask, times_derivative_by_slope(grad, z), 0.0)
                grad = times_derivative(grad, z, own, ACTIVATION, NARROW)
            else:
                grad = times_derivative(grad, z, slope, ACTIVATION, NARROW)
        tl.store(grad_x_ptr + offs, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            total += tl.where(mask, grad, 0.0)
    if partial_ptr is not None:
        _store_sums(partial_ptr, total, first, split, splits, rows, columns, LAST, ROWS, BLOCK)
    if slopes_partial_ptr is not None:
        _store_sums(slopes_partial_ptr, by_slope, first, split, splits, rows, columns, LAST, ROWS, BLOCK)


def _geometry(name, x, by_channel):
    """(rows, units, channels, splits), and the constants of a launch."""
    (outer, channels, inner), joined = joined_extent(x, by_channel)
    last = by_channel and inner == 1
    rows, columns = (outer, channels) if last else (outer * channels, inner)
    chosen = launch(f"bias_act/{name}", x, (rows, columns), elements=ELEMENTS, num_warps=NUM_WARPS)
    tile, block, splits = row_tile(columns, chosen["elements"])
    if last and block > MOST_LAST:
        tile, block, splits = chosen["elements"] // MOST_LAST, MOST_LAST, ceil_div(columns, MOST_LAST)
    unit = math.gcd(columns, 8)
    sizes = (rows, columns // unit, channels // joined, splits)
    warps = chosen["num_warps"]
    return sizes, dict(LAST=last, JOINED=joined > 1, UNIT=unit, ROWS=tile, BLOCK=block, num_warps=warps)


def bias_act(x, bias, slopes, activation, slope):
    code_beside(slopes, activation)
    x = dense_channels(x)
    vectors = require_bias_and_slopes(x, bias, slopes)
    y = torch.empty_like(x)
    if x.numel():
        sizes, constants = _geometry("forward", x, any(v is not None and v.numel() != 1 for v in vectors))
        rows, _, _, splits = sizes
        grid = (ceil_div(rows, constants["ROWS"]) * splits,)
        _bias_act_forward[grid](x, y, *vectors, *sizes, slope, ACTIVATION=activation, **constants)
    return y


def bias_act_backward(grad_y, saved, bias, slopes, from_output, with_bias, activation, slope):
    code_beside(slopes, activation)
    require_alike(saved, grad_y)
    saved = dense_channels(saved)
    grad_y = like_layout(grad_y, saved)
    vectors = require_bias_and_slopes(saved, None if from_output else bias, slopes)
    grad_x = torch.empty_like(saved)
    lengths = (saved.size(1) if with_bias else 0, 0 if slopes is None else slopes.numel())
    if not saved.numel():
        return grad_x, *(saved.new_zeros(n, dtype=torch.float32) for n in lengths)
    by_channel = with_bias or any(v is not None and v.numel() != 1 for v in vectors)
    sizes, constants = _geometry("backward", saved, by_channel)
    rows, _, _, splits = sizes
    groups, last = ceil_div(rows, constants["ROWS"]), constants["LAST"]
    steps = ceil_div(groups * splits, PROGRAMS) if last else 1
    steps = 1 << (steps - 1).bit_length()  # powers of two: each compiles
    groups = ceil_div(groups, steps)
    # Rows of channels, perhaps joined, or [outer, channels, splits].
    count = (groups if last else rows) * (saved.numel() // rows if last else splits)
    partials = [saved.new_empty(count, dtype=torch.float32) if n else None for n in lengths]
    _bias_act_backward[(groups * splits,)](
        grad_y, saved, *vectors, grad_x, *partials, *sizes, slope, ACTIVATION=activation, FROM_OUTPUT=from_output,
        STEPS=steps, **constants,
    )  # fmt: skip
    return grad_x, *(
        saved.new_empty(0, dtype=torch.float32) if partial is None
        else partial.view(-1, n).sum(0) if last else partial.view(-1, n, splits).sum((0, 2))
        for partial, n in zip(partials, lengths, strict=True)
    )  # fmt: skip
