"""Gradients of a transposed convolution to a few channels: taps and channels together are the columns of one matrix.

dy has a few numbers a pixel, so a block of channels would be empty for the most part. Its [pixels of x, KH KW CO]
matrix is gathered number by number instead: dx is that times the weight as it lies in memory, and the weight's
gradient is x^T times it, with every element of x and dx passing through once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genai_fast.kernels.common.dot_triton import dot


@triton.jit
def position(pixel, height, width):
    """(sample, y, x) of pixels counted through [N, height, width]; an empty plane gives anything."""
    line = pixel // tl.maximum(width, 1)
    sample = line // tl.maximum(height, 1)
    return sample, line - sample * height, pixel - line * width


@triton.jit
def _gather(
    grad_y_ptr, first, pixel, pixels, k,     # [N, OH, OW, CO], the least of [R, 1], all, [1, K]: column (ky, kx, co)
    height, width, out_height, out_width,
    KH: tl.constexpr, KW: tl.constexpr, CO: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr,
):  # fmt: skip
    """dy under each tap of each pixel of x, [R, K]; 0 outside."""
    start = first // tl.maximum(height * width, 1)
    sample, y, x = position(pixel, height, width)
    y = tl.where(pixel < pixels, y * SH - PH, -(2**30))
    x = x * SW - PW
    ky = k // (KW * CO)
    kx = k // CO % KW
    # As unsigned numbers what lies before the plane lies far behind it.
    seen_y = (y + ky).to(tl.uint32, bitcast=True) < out_height
    seen_x = (x + kx).to(tl.uint32, bitcast=True) < out_width
    grad_y_ptr += start.to(tl.int64) * out_height * out_width * CO
    offs = (((sample - start) * out_height + y) * out_width + x) * CO + ((ky * out_width + kx) * CO + k % CO)
    return tl.load(grad_y_ptr + offs, mask=seen_y & seen_x & (k < KH * KW * CO), other=0.0)


@triton.jit
def _few_grad_input(
    grad_y_ptr, weight_ptr, grad_x_ptr,      # [N, OH, OW, CO], [CI, KH, KW, CO], [N, H, W, CI]
    batch, height, width, out_height, out_width, channels, CO: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx[pixel, ci] = sum over (ky, kx, co) of dy[pixel under the tap, co] weight[ci, ky, kx, co]."""
    blocks = tl.cdiv(channels, BLOCK_N)
    start = tl.program_id(0) // blocks * BLOCK_M
    pixel = start + tl.arange(0, BLOCK_M)
    pixels = batch * height * width
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.static_range(0, KH * KW * CO, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = _gather(
            grad_y_ptr, start, pixel[:, None], pixels, k[None, :], height, width, out_height, out_width, KH, KW, CO,
            SH, SW, PH, PW,
        )  # fmt: skip
        b_mask = (k < KH * KW * CO)[:, None] & (column < channels)
        b = tl.load(weight_ptr + (column * (KH * KW * CO) + k[:, None]), mask=b_mask, other=0.0)
        acc = dot(a, b, acc, PRECISION, UPCAST)
    at = grad_x_ptr + (pixel[:, None].to(tl.int64) * channels + column)
    tl.store(at, acc.to(grad_x_ptr.dtype.element_ty), mask=(pixel < pixels)[:, None] & (column < channels))


@triton.jit
def _few_grad_weight(
    grad_y_ptr, x_ptr,                       # [N, OH, OW, CO], [N, H, W, CI]
    partial_ptr,                             # [splits, CI, KH, KW, CO]
    batch, height, width, out_height, out_width, channels, CO: tl.constexpr, steps,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum over `steps` blocks of pixels of x[pixel, ci] dy[pixel under the tap, co], for BLOCK_N columns (tap, co)."""
    across: tl.constexpr = (KH * KW * CO + BLOCK_N - 1) // BLOCK_N
    down = tl.cdiv(channels, BLOCK_M)
    column = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    row = tl.program_id(0) // across % down * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(0) // across // down
    pixels = batch * height * width
    first = split * steps * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(steps):
        pixel = first + tl.arange(0, BLOCK_K)[:, None]
        a_mask = (pixel < pixels) & (row < channels)[None, :]
        a_ptr = x_ptr + first.to(tl.int64) * channels
        a = tl.load(a_ptr + (tl.arange(0, BLOCK_K)[:, None] * channels + row[None, :]), mask=a_mask, other=0.0)
        b = _gather(
            grad_y_ptr, first, pixel, pixels, column, height, width, out_height, out_width, KH, KW, CO, SH, SW, PH, PW
        )
        acc = dot(tl.trans(a), b, acc, PRECISION, UPCAST)
        first += BLOCK_K
    at = partial_ptr + ((split.to(tl.int64) * channels + row[:, None]) * (KH * KW * CO) + column)
    tl.store(at, acc.to(partial_ptr.dtype.element_ty), mask=(row < channels)[:, None] & (column < KH * KW * CO))
