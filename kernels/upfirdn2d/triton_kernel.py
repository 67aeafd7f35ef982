"""upfirdn2d on the GPU: [planes, H, W, inner] images, inner being the channels where they lie last."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common.launch import ceil_div, row_tile
from genai_fast.kernels.common.tuned import launch
from genai_fast.kernels.upfirdn2d.layout import MOST_TAPS, Axis, images, require

ELEMENTS = 1024  # a step of a program
NUM_WARPS = 4
MOST_AT_ONCE = 16  # taps of a separable filter's product up to which one pass over memory is less than two


@triton.jit
def _meets(o, before, ahead, UP: tl.constexpr, DOWN: tl.constexpr):
    """Of the result's lines or columns o: the first that is read, perhaps outside, and the tap that meets it."""
    if UP == 1:
        phase = tl.zeros_like(o)
        first = o * DOWN - before
    else:
        at = o * DOWN - before + ahead * UP  # not negative
        first = (at + (UP - 1)) // UP
        phase = first * UP - at
        first -= ahead
    return first, phase


@triton.jit
def _upfirdn2d(
    x_ptr, y_ptr,                            # [planes, height, width, inner], [planes, out_height, out_width, inner]
    filter_ptr,                              # [FH, FW], or [FH] if SEPARABLE
    rows, columns, splits, height, width, out_height, inner, top, left, ahead_y, ahead_x, gain,
    FH: tl.constexpr, FW: tl.constexpr, UP_Y: tl.constexpr, UP_X: tl.constexpr, DOWN_Y: tl.constexpr,
    DOWN_X: tl.constexpr, SEPARABLE: tl.constexpr, FLIP: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum over the taps that meet pixels: ROWS lines of the result, BLOCK of their out_width inner columns."""
    row = (tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) % splits * BLOCK + tl.arange(0, BLOCK))[None, :]
    plane = row // out_height
    pixel = column // inner if LAST else column
    first_y, phase_y = _meets(row - plane * out_height, top, ahead_y, UP_Y, DOWN_Y)
    first_x, phase_x = _meets(pixel, left, ahead_x, UP_X, DOWN_X)
    here = (row < rows) & (column < columns)
    from_x = first_x * inner + (column - pixel * inner) if LAST else first_x
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for ty in tl.static_range((FH + UP_Y - 1) // UP_Y):
        y = first_y + ty
        ky = phase_y + ty * UP_Y
        # As unsigned numbers what lies before the plane lies far behind it.
        seen_y = (y.to(tl.uint32, bitcast=True) < height) & (ky < FH)
        line_ptr = x_ptr + (plane.to(tl.int64) * height + y) * width * inner
        line = tl.zeros([ROWS, BLOCK], tl.float32)
        for tx in tl.static_range((FW + UP_X - 1) // UP_X):
            x = first_x + tx
            kx = phase_x + tx * UP_X
            seen_x = (x.to(tl.uint32, bitcast=True) < width) & (kx < FW)
            value = tl.load(line_ptr + (from_x + tx * inner), mask=here & seen_y & seen_x, other=0.0).to(tl.float32)
            at_x = kx if FLIP else FW - 1 - kx
            if SEPARABLE:
                weight = tl.load(filter_ptr + at_x, mask=kx < FW, other=0.0)
            else:
                at_y = ky if FLIP else FH - 1 - ky
                weight = tl.load(filter_ptr + (at_y * FW + at_x), mask=(ky < FH) & (kx < FW), other=0.0)
            line += weight * value
        if SEPARABLE:
            at_y = ky if FLIP else FH - 1 - ky
            line *= tl.load(filter_ptr + at_y, mask=ky < FH, other=0.0)
        acc += line
    y_ptr += row.to(tl.int64) * columns + column
    tl.store(y_ptr, (acc * gain).to(y_ptr.dtype.element_ty), mask=here)


def _run(x, y, planes, inner, filter, vertical, horizontal, gain, flip):
    rows, columns = planes * vertical.out, horizontal.out * inner
    chosen = launch("upfirdn2d/forward", x, (rows, columns), elements=ELEMENTS, num_warps=NUM_WARPS)
    tile, block, splits = row_tile(columns, chosen["elements"])
    ahead = (ceil_div(max(axis.before, 0), axis.up) for axis in (vertical, horizontal))
    _upfirdn2d[(ceil_div(rows, tile) * splits,)](
        x, y, filter, rows, columns, splits, vertical.size, horizontal.size, vertical.out, inner, vertical.before,
        horizontal.before, *ahead, gain, FH=vertical.taps, FW=horizontal.taps, UP_Y=vertical.up, UP_X=horizontal.up,
        DOWN_Y=vertical.down, DOWN_X=horizontal.down, SEPARABLE=filter.dim() == 1, FLIP=flip, LAST=inner > 1,
        ROWS=tile, BLOCK=block, num_warps=chosen["num_warps"],
    )  # fmt: skip


def upfirdn2d(x, filter, up, down, padding, gain, flip):
    vertical, horizontal = require(x, filter, up, down, padding)
    both = filter.dim() == 1 and vertical.most * horizontal.most > MOST_AT_ONCE
    if max(vertical.most, horizontal.most) > MOST_TAPS or (filter.dim() == 2 and filter.numel() > MOST_TAPS**2):
        raise ValueError(f"upfirdn2d: expected at most {MOST_TAPS} taps that meet a pixel, got {tuple(filter.shape)}")
    x, y, planes, inner = images(x, (vertical.out, horizontal.out))
    filter = filter.contiguous()
    if not y.numel():
        return y
    if not both:
        _run(x, y, planes, inner, filter, vertical, horizontal, gain, flip)
        return y
    # One dimension after the other; what is between them in float32.
    half = torch.empty((planes, vertical.size, horizontal.out, inner), dtype=torch.float32, device=x.device)
    untouched = (Axis(vertical.size, vertical.size, 1, 1, 0, 1), Axis(horizontal.out, horizontal.out, 1, 1, 0, 1))
    _run(x, half, planes, inner, filter[None], untouched[0], horizontal, gain, flip)
    _run(half, y, planes, inner, filter[:, None], vertical, untouched[1], 1.0, flip)
    return y
