"""causal_conv1d on the GPU: implicit matrix products over taps and channels, with the gate on the accumulators.

All tensors are [N, L, C], channels last: each tap reads the rows of x at its distance, in the same sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.causal_conv1d.layout import (
    GATED,
    condition_strides,
    dense_condition,
    out_channels,
    require,
    sequences,
)
from genai_fast.kernels.common.activations_triton import activate, sigmoid, tanh, times_derivative
from genai_fast.kernels.common.dot_triton import dot
from genai_fast.kernels.common.extension import interpreting
from genai_fast.kernels.common.launch import ceil_div, compiled, next_power_of_2, row_tile
from genai_fast.kernels.common.recorder import reads
from genai_fast.kernels.common.tuned import launch

NUM_STAGES, NUM_WARPS = 3, 4
PROGRAMS = 264  # two for each multiprocessor of an H100: fewer leave it idle
LEAST_STEPS = 8  # blocks of positions that a split of a weight's gradient adds up
ELEMENTS = 1024  # a step of a program that goes through memory once
SUM_PROGRAMS = 1024  # that share the rows of column sums


@triton.jit
def _causal_conv1d(
    x_ptr, weight_ptr, bias_ptr,             # [N, L, C], [K, C, CO] by its strides, [CO] or None
    condition_ptr, y_ptr, z_ptr,             # [N, CO] or [N, L, CO] or None, [N L, CO or CO / 2], [N L, CO] or None
    rows, length, channels, columns, x_sample, x_position, condition_sample, condition_position,
    weight_tap, weight_row, weight_column, dilation,
    KERNEL: tl.constexpr, SIGN: tl.constexpr, ACTIVATION: tl.constexpr, EVEN: tl.constexpr,  # whole blocks of channels
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z = sum over the taps of x[l + SIGN back] weight[tap] + bias + condition, y = activation(z).

    BLOCK_M positions and BLOCK_N channels of y a program; of a gate two accumulators, which share what is read of x.
    """
    half = columns // 2 if ACTIVATION == "gated_tanh" else columns
    blocks = tl.cdiv(half, BLOCK_N)
    row = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = row // length
    position = row - sample * length
    inside = column < half
    x_ptr += (sample.to(tl.int64) * x_sample)[:, None]
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    other = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = tl.full((), 0, tl.int32)
    tap = tl.full((), 0, tl.int32)
    for _ in range(KERNEL * tl.cdiv(channels, BLOCK_K)):
        source = position + SIGN * (KERNEL - 1 - tap) * dilation
        k = first + offs_k
        x_mask = ((row < rows) & (source >= 0) & (source < length))[:, None]
        weight_mask = inside[None, :]
        if not EVEN:
            x_mask &= (k < channels)[None, :]
            weight_mask &= (k < channels)[:, None]
        x = tl.load(x_ptr + (source[:, None] * x_position + k[None, :]), mask=x_mask, other=0.0)
        weight = weight_ptr + (tap * weight_tap + k[:, None] * weight_row + column[None, :] * weight_column)
        acc = dot(x, tl.load(weight, mask=weight_mask, other=0.0), acc, PRECISION, UPCAST)
        if ACTIVATION == "gated_tanh":
            weight += half * weight_column
            other = dot(x, tl.load(weight, mask=weight_mask, other=0.0), other, PRECISION, UPCAST)
        first += BLOCK_K
        last = first >= channels
        first = tl.where(last, 0, first)
        tap = tl.where(last, tap + 1, tap)
    mask = (row < rows)[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None]
    given = sample.to(tl.int64)[:, None] * condition_sample + position[:, None] * condition_position + column[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=inside, other=0.0)[None, :]
    if condition_ptr is not None:
        acc += tl.load(condition_ptr + given, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "gated_tanh":
        if bias_ptr is not None:
            other += tl.load(bias_ptr + half + column, mask=inside, other=0.0)[None, :]
        if condition_ptr is not None:
            other += tl.load(condition_ptr + half + given, mask=mask, other=0.0).to(tl.float32)
    if z_ptr is not None:
        z = z_ptr + (at * columns + column[None, :])
        tl.store(z, acc.to(z_ptr.dtype.element_ty), mask=mask)
        if ACTIVATION == "gated_tanh":
            tl.store(z + half, other.to(z_ptr.dtype.element_ty), mask=mask)
    acc = tanh(acc) * sigmoid(other) if ACTIVATION == "gated_tanh" else activate(acc, 0.0, ACTIVATION)
    tl.store(y_ptr + (at * half + column[None, :]), acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _causal_conv1d_grad_weight(
    grad_z_ptr, x_ptr, partial_ptr,          # [N, L, CO], [N, L, C], [splits, K, CO, C]
    rows, length, channels, columns, z_sample, z_position, x_sample, x_position, dilation, steps,
    KERNEL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum over `steps` blocks of positions of dz[l, co] x[l - back, ci], for one tap a program."""
    across, down = tl.cdiv(channels, BLOCK_N), tl.cdiv(columns, BLOCK_M)
    column = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    rest = tl.program_id(0) // across
    line = rest % down * BLOCK_M + tl.arange(0, BLOCK_M)
    tap = rest // down % KERNEL
    split = rest // down // KERNEL
    back = (KERNEL - 1 - tap) * dilation
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    row = split * steps * BLOCK_K + tl.arange(0, BLOCK_K)
    for _ in range(steps):
        sample = row // length
        position = row - sample * length
        dz_at = sample.to(tl.int64)[:, None] * z_sample + (position[:, None] * z_position + line[None, :])
        dz = tl.load(grad_z_ptr + dz_at, mask=(row < rows)[:, None] & (line < columns)[None, :], other=0.0)
        x_at = sample.to(tl.int64)[:, None] * x_sample + ((position - back)[:, None] * x_position + column[None, :])
        seen = ((row < rows) & (position >= back))[:, None] & (column < channels)[None, :]
        acc = dot(tl.trans(dz), tl.load(x_ptr + x_at, mask=seen, other=0.0), acc, PRECISION, UPCAST)
        row += BLOCK_K
    at = ((split.to(tl.int64) * KERNEL + tap) * columns + line[:, None]) * channels + column[None, :]
    tl.store(partial_ptr + at, acc, mask=(line < columns)[:, None] & (column < channels)[None, :])


@triton.jit
def _causal_conv1d_gate_backward(
    grad_y_ptr, z_ptr, grad_z_ptr, partial_ptr,  # [rows, half], [rows, 2 half] twice, [programs, 2 half]
    rows, half, y_row, splits,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz of y = tanh(a) sigmoid(b), z = (a, b), and its sums over this program's rows."""
    first, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    column = (split * BLOCK + tl.arange(0, BLOCK))[None, :]
    a_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(STEPS):
        row = ((first * STEPS + step).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & (column < half)
        dy = tl.load(grad_y_ptr + (row * y_row + column), mask=mask, other=0.0).to(tl.float32)
        at = row * (2 * half) + column
        t = tanh(tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32))
        s = sigmoid(tl.load(z_ptr + half + at, mask=mask, other=0.0).to(tl.float32))
        of_a = dy * s * (1.0 - t * t)
        of_b = dy * s * t * (1.0 - s)
        tl.store(grad_z_ptr + at, of_a.to(grad_z_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_z_ptr + half + at, of_b.to(grad_z_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            a_sum += tl.where(mask, of_a, 0.0)
            b_sum += tl.where(mask, of_b, 0.0)
    if partial_ptr is not None:
        column = split * BLOCK + tl.arange(0, BLOCK)
        partial_ptr += first.to(tl.int64) * 2 * half + column
        tl.store(partial_ptr, tl.sum(a_sum, axis=0), mask=column < half)
        tl.store(partial_ptr + half, tl.sum(b_sum, axis=0), mask=column < half)


@triton.jit
def _depthwise_causal_conv1d(
    x_ptr, weight_ptr, bias_ptr, y_ptr,      # [N, L, C], [K, C], [C] or None, [N L, C]
    rows, length, channels, x_sample, x_position, dilation, splits,
    KERNEL: tl.constexpr, SIGN: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[l] = activation(sum over the taps of x[l + SIGN back] weight[tap] + bias)."""
    group, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    row = group * ROWS + tl.arange(0, ROWS)
    column = split * BLOCK + tl.arange(0, BLOCK)
    sample = row // length
    position = row - sample * length
    inside = column < channels
    x_ptr += (sample.to(tl.int64) * x_sample)[:, None]
    z = tl.zeros([ROWS, BLOCK], tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=inside, other=0.0)[None, :]
    for tap in tl.static_range(KERNEL):
        source = position + SIGN * (KERNEL - 1 - tap) * dilation
        mask = ((row < rows) & (source >= 0) & (source < length))[:, None] & inside[None, :]
        x = tl.load(x_ptr + (source[:, None] * x_position + column[None, :]), mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + (tap * channels + column), mask=inside, other=0.0).to(tl.float32)
        z += x * weight[None, :]
    z = activate(z, 0.0, ACTIVATION)
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


@triton.jit
def _depthwise_causal_conv1d_backward(
    grad_y_ptr, x_ptr, weight_ptr, bias_ptr,  # [N, L, C] twice, [K, C], [C] or None
    grad_z_ptr, partial_ptr,                  # [N L, C] or None, [programs / splits, K + 1, C]
    rows, length, channels, y_sample, y_position, x_sample, x_position, dilation, splits, steps,
    KERNEL: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz = dy act'(z), z computed again; over this program's rows sums of dz, and of dz times what each tap sees."""
    first, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    column = split * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    sum_0 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_1 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_2 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_3 = tl.zeros([ROWS, BLOCK], tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    row = first * steps * ROWS + tl.arange(0, ROWS)
    for _ in range(steps):
        sample = row // length
        position = row - sample * length
        exists = (row < rows)[:, None] & inside[None, :]
        x_at = x_ptr + (sample.to(tl.int64) * x_sample)[:, None] + column[None, :]
        y_at = sample.to(tl.int64)[:, None] * y_sample + (position[:, None] * y_position + column[None, :])
        dz = tl.load(grad_y_ptr + y_at, mask=exists, other=0.0).to(tl.float32)
        x_0 = _seen(x_at, position, length, x_position, (KERNEL - 1) * dilation, exists)
        x_1 = _seen(x_at, position, length, x_position, (KERNEL - 2) * dilation, exists & (KERNEL > 1))
        x_2 = _seen(x_at, position, length, x_position, (KERNEL - 3) * dilation, exists & (KERNEL > 2))
        x_3 = _seen(x_at, position, length, x_position, (KERNEL - 4) * dilation, exists & (KERNEL > 3))
        if ACTIVATION != "none":
            z = x_0 * _tap(weight_ptr, column, inside, 0, channels)
            if bias_ptr is not None:
                z += tl.load(bias_ptr + column, mask=inside, other=0.0)[None, :]
            if KERNEL > 1:
                z += x_1 * _tap(weight_ptr, column, inside, 1, channels)
            if KERNEL > 2:
                z += x_2 * _tap(weight_ptr, column, inside, 2, channels)
            if KERNEL > 3:
                z += x_3 * _tap(weight_ptr, column, inside, 3, channels)
            dz = times_derivative(dz, z, 0.0, ACTIVATION)
            at = row.to(tl.int64)[:, None] * channels + column[None, :]
            tl.store(grad_z_ptr + at, dz.to(grad_z_ptr.dtype.element_ty), mask=exists)
        dz = tl.where(exists, dz, 0.0)
        total += dz
        sum_0 += dz * x_0
        sum_1 += dz * x_1
        sum_2 += dz * x_2
        sum_3 += dz * x_3
        row += ROWS
    partial_ptr += first.to(tl.int64) * (KERNEL + 1) * channels + column
    tl.store(partial_ptr, tl.sum(sum_0, axis=0), mask=inside)
    if KERNEL > 1:
        tl.store(partial_ptr + channels, tl.sum(sum_1, axis=0), mask=inside)
    if KERNEL > 2:
        tl.store(partial_ptr + 2 * channels, tl.sum(sum_2, axis=0), mask=inside)
    if KERNEL > 3:
        tl.store(partial_ptr + 3 * channels, tl.sum(sum_3, axis=0), mask=inside)
    tl.store(partial_ptr + KERNEL * channels, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _seen(x_ptr, position, length, x_position, back, mask):
    """What a tap that looks back so far sees, [ROWS, BLOCK] in float32; nothing where the mask says so."""
    mask = mask & (position >= back)[:, None]
    return tl.load(x_ptr + ((position - back) * x_position)[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _tap(weight_ptr, column, inside, tap, channels):
    return tl.load(weight_ptr + (tap * channels + column), mask=inside, other=0.0).to(tl.float32)[None, :]


def _multiplier(x):
    """How tl.dot multiplies: in TF32 only where torch lets cuDNN's convolutions do so."""
    tf32 = compiled(x) and reads(lambda: torch.backends.cudnn.conv.fp32_precision) == "tf32"
    return dict(PRECISION="tf32" if tf32 else "ieee", UPCAST=interpreting() and x.dtype is torch.bfloat16)


def _block(size, most):
    """A power of two that tl.dot takes, large enough for `size` or the most there is."""
    return min(max(next_power_of_2(size), 16), most)


def _tile(name, x, rows, columns, reduced, gated=False):
    """BLOCK_M, BLOCK_N, BLOCK_K and how to multiply: 128 x 64 x 64 of 16 bits, less of more bits or of small sizes."""
    multiplier = _multiplier(x)
    block_n, block_k = _block(columns, 32 if gated else 64), _block(reduced, 128 // x.element_size())
    block_m = 128 if ceil_div(rows, 128) * ceil_div(columns, block_n) >= PROGRAMS // 2 else 64
    if x.dtype is torch.float32 and multiplier["PRECISION"] == "ieee":  # no matrix instructions: smaller tiles
        block_m, block_n, block_k, name = 64, min(block_n, 16 if gated else 32), 16, f"{name}_ieee"
    chosen = launch(
        f"causal_conv1d/{name}", x, (rows, columns, reduced),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return chosen | multiplier


def _convolve(x, taps, bias, condition, y, z, columns, dilation, sign, activation):
    """taps [K, C, CO], any strides."""
    (batch, length, channels), gated = x.shape, activation == GATED
    x, condition = sequences(x), dense_condition(condition)
    bias = bias if bias is None else bias.float().contiguous()
    half = columns // 2 if gated else columns
    rows = batch * length
    tile = _tile("gated" if gated else "forward" if sign < 0 else "grad_input", x, rows, half, channels, gated)
    _causal_conv1d[(ceil_div(rows, tile["BLOCK_M"]) * ceil_div(half, tile["BLOCK_N"]),)](
        x, taps, bias, condition, y, z, rows, length, channels, columns, x.stride(0), x.stride(1),
        *condition_strides(condition), *taps.stride(), dilation, KERNEL=taps.size(0), SIGN=sign, ACTIVATION=activation,
        EVEN=channels % tile["BLOCK_K"] == 0, **tile,
    )  # fmt: skip


def causal_conv1d(x, weight, bias, condition, dilation, activation, keep):
    batch, length, columns = *x.shape[:2], weight.size(0)
    shape = (batch, columns) if condition is not None and condition.dim() == 2 else (batch, length, columns)
    require(x, weight, dilation, (bias, (columns,)), (condition, shape))
    y = x.new_empty((batch, length, out_channels(columns, activation)))
    z = x.new_empty((batch, length, columns) if keep else (0,))
    if y.numel():
        taps = weight.permute(2, 1, 0).contiguous()
        _convolve(x, taps, bias, condition, y, z if keep else None, columns, dilation, -1, activation)
    return y, z


def causal_conv1d_grad_input(grad_z, weight, dilation):
    require(grad_z, weight.transpose(0, 1), dilation)
    grad_x = grad_z.new_empty((*grad_z.shape[:2], weight.size(1)))
    if grad_x.numel():
        taps = weight.permute(2, 0, 1).contiguous()
        _convolve(grad_z, taps, None, None, grad_x, None, weight.size(1), dilation, 1, "none")
    return grad_x


def causal_conv1d_grad_weight(grad_z, x, kernel, dilation):
    (batch, length, channels), columns = x.shape, grad_z.size(2)
    require(x, x.new_empty(1).expand(columns, channels, kernel), dilation, (grad_z, (batch, length, columns)))
    grad_z, x, rows = sequences(grad_z.to(x.dtype)), sequences(x), batch * length
    if not rows:
        return x.new_zeros((columns, channels, kernel))
    tile = _tile("grad_weight", x, columns, channels, rows)
    tile["BLOCK_M"] = min(tile["BLOCK_M"], 64)
    programs = ceil_div(columns, tile["BLOCK_M"]) * ceil_div(channels, tile["BLOCK_N"]) * kernel
    # The number of splits follows from the sizes alone, so that every run adds in the same order.
    blocks = ceil_div(rows, tile["BLOCK_K"])
    steps = ceil_div(blocks, min(ceil_div(PROGRAMS, programs), ceil_div(blocks, LEAST_STEPS)))
    splits = ceil_div(blocks, steps)
    partial = x.new_empty((splits, kernel, columns, channels), dtype=torch.float32)
    _causal_conv1d_grad_weight[(programs * splits,)](
        grad_z, x, partial, rows, length, channels, columns, grad_z.stride(0), grad_z.stride(1), x.stride(0),
        x.stride(1), dilation, steps, KERNEL=kernel, **tile,
    )  # fmt: skip
    return partial.sum(0).permute(1, 2, 0).to(x.dtype).contiguous()


def causal_conv1d_gate_backward(grad_y, z, with_bias):
    half = z.size(2) // 2
    require(grad_y, grad_y.new_empty(1).expand(half, 1), 1, (z, (*grad_y.shape[:2], 2 * half)))
    grad_y, z = grad_y.to(z.dtype).contiguous(), z.contiguous()
    grad_z, rows = torch.empty_like(z), z.size(0) * z.size(1)
    if not rows:
        return grad_z, z.new_zeros(2 * half if with_bias else 0, dtype=torch.float32)
    tile, block, splits, warps = _elementwise("gate_backward", z, rows, half)
    groups, steps = _shares(ceil_div(rows, tile), splits, with_bias)
    partial = z.new_empty((groups, 2 * half), dtype=torch.float32) if with_bias else None
    _causal_conv1d_gate_backward[(groups * splits,)](
        grad_y, z, grad_z, partial, rows, half, half, splits, STEPS=steps, ROWS=tile, BLOCK=block, num_warps=warps
    )
    return grad_z, partial.sum(0) if with_bias else z.new_empty(0, dtype=torch.float32)


def _elementwise(name, x, rows, columns):
    """(ROWS, BLOCK, splits, num_warps)"""
    chosen = launch(f"causal_conv1d/{name}", x, (rows, columns), elements=ELEMENTS, num_warps=NUM_WARPS)
    return *row_tile(columns, chosen["elements"]), chosen["num_warps"]


def _shares(groups, splits, summed):
    """(programs along the rows, steps of each): sums are of few programs. Powers of two: each compiles."""
    steps = ceil_div(groups * splits, SUM_PROGRAMS) if summed else 1
    steps = 1 << (steps - 1).bit_length()
    return ceil_div(groups, steps), steps


def _filter(x, taps, bias, y, dilation, sign, activation):
    """y = the depthwise convolution of x [N, L, C] by the taps [K, C], dense."""
    batch, length, channels = x.shape
    rows = batch * length
    tile, block, splits, warps = _elementwise("depthwise", x, rows, channels)
    _depthwise_causal_conv1d[(ceil_div(rows, tile) * splits,)](
        x, taps, bias, y, rows, length, channels, x.stride(0), x.stride(1), dilation, splits,
        KERNEL=taps.size(0), SIGN=sign, ACTIVATION=activation, ROWS=tile, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def depthwise_causal_conv1d(x, weight, bias, dilation, activation):
    require(x, weight, dilation, (bias, (x.size(2),)))
    x, bias = sequences(x), bias if bias is None else bias.float().contiguous()
    y = x.new_empty(x.shape)
    if y.numel():
        _filter(x, weight.T.contiguous(), bias, y, dilation, -1, activation)
    return y


def depthwise_causal_conv1d_backward(grad_y, x, weight, bias, dilation, activation):
    require(x, weight, dilation, (bias, (x.size(2),)), (grad_y, tuple(x.shape)))
    x, grad_y, taps = sequences(x), sequences(grad_y.to(x.dtype)), weight.T.contiguous()
    bias, (batch, length, channels), kernel = (
        bias if bias is None else bias.float().contiguous(),
        x.shape,
        weight.size(1),
    )
    grad_x, rows = x.new_empty(x.shape), batch * length
    if not rows:
        return grad_x, *(x.new_zeros(s, dtype=torch.float32) for s in (weight.shape, (channels,)))
    grad_z = grad_y if activation == "none" else x.new_empty(x.shape)
    tile, block, splits, warps = _elementwise("depthwise_backward", x, rows, channels)
    groups, steps = _shares(ceil_div(rows, tile), splits, True)
    partial = x.new_empty((groups, kernel + 1, channels), dtype=torch.float32)
    _depthwise_causal_conv1d_backward[(groups * splits,)](
        grad_y, x, taps, bias, None if activation == "none" else grad_z, partial, rows, length, channels,
        grad_y.stride(0), grad_y.stride(1), x.stride(0), x.stride(1), dilation, splits, steps,
        KERNEL=kernel, ACTIVATION=activation, ROWS=tile, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    _filter(grad_z, taps, None, grad_x, dilation, 1, "none")
    sums = partial.sum(0)
    return grad_x, sums[:-1].T.contiguous(), sums[-1].clone()
