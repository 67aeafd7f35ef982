"""gated_act on the GPU: tiles of [rows, columns]; backward sums each tile's columns for the bias on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common.activations_triton import activate, times_derivative
from genai_fast.kernels.common.launch import ceil_div, row_tile
from genai_fast.kernels.common.tuned import launch
from genai_fast.kernels.gated_act.layout import operands, results

ELEMENTS = 1024  # a step of a program: 8 elements a thread
NUM_WARPS = 4
WITH_BIAS = 64  # columns at most: the rows of a program read the bias once, which in float32 is twice as large
PROGRAMS = 1024  # that share the rows of the bias's sums: enough for every GPU, few enough to add up


@triton.jit
def _operands(gate_ptr, up_ptr, bias_ptr, row, column, mask, gate_stride, up_stride, columns):
    """gate + bias and up + bias [ROWS, BLOCK]."""
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        across = tl.broadcast_to(column, gate.shape)  # else a thread would hold other columns of it than of the tile
        gate += tl.load(bias_ptr + across, mask=mask, other=0.0)
        up += tl.load(bias_ptr + columns + across, mask=mask, other=0.0)
    return gate, up


@triton.jit
def _gated_act_forward(
    gate_ptr, up_ptr, bias_ptr, y_ptr,       # [rows, columns] twice, [2 columns] or None, [rows, columns]
    rows, columns, gate_stride, up_stride, splits, gate_multiplier, down_multiplier,
    ACTIVATION: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = d activate(m (gate + bias)) (up + bias), the multipliers m and d 1 unless SCALED."""
    group, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    row = (group.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]  # rows * columns passes 2**31
    column = (split * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < rows) & (column < columns)
    gate, up = _operands(gate_ptr, up_ptr, bias_ptr, row, column, mask, gate_stride, up_stride, columns)
    if SCALED:
        gate *= gate_multiplier
        up *= down_multiplier
    y = activate(gate, 0.0, ACTIVATION, y_ptr.dtype.element_ty != tl.float32) * up
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_act_backward(
    grad_y_ptr, gate_ptr, up_ptr, bias_ptr,  # [rows, columns] three times, [2 columns] or None
    grad_gate_ptr, grad_up_ptr,              # [rows, columns] twice
    partial_ptr,                             # [programs / splits, 2 columns] or None
    rows, columns, y_stride, gate_stride, up_stride, grad_stride, splits, gate_multiplier, down_multiplier,
    ACTIVATION: tl.constexpr, SCALED: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate = dy (up + bias) act'(gate + bias), dup = dy act(gate + bias), and their sums over this program's rows.

    SCALED: d dy for dy, m (gate + bias) in act and act', and m times that dgate.
    """
    first, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    NARROW: tl.constexpr = grad_gate_ptr.dtype.element_ty != tl.float32
    column = (split * BLOCK + tl.arange(0, BLOCK))[None, :]
    gate_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    up_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(STEPS):
        group = first * STEPS + step
        row = (group.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & (column < columns)
        grad = tl.load(grad_y_ptr + row * y_stride + column, mask=mask, other=0.0).to(tl.float32)
        gate, up = _operands(gate_ptr, up_ptr, bias_ptr, row, column, mask, gate_stride, up_stride, columns)
        if SCALED:
            gate *= gate_multiplier
            grad *= down_multiplier
        of_gate = times_derivative(grad * up, gate, 0.0, ACTIVATION, NARROW)
        of_up = grad * activate(gate, 0.0, ACTIVATION, NARROW)
        if SCALED:
            of_gate *= gate_multiplier
        offs = row * grad_stride + column
        tl.store(grad_gate_ptr + offs, of_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_up_ptr + offs, of_up.to(grad_up_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            gate_sum += tl.where(mask, of_gate, 0.0)
            up_sum += tl.where(mask, of_up, 0.0)
    if partial_ptr is not None:
        column = split * BLOCK + tl.arange(0, BLOCK)
        partial_ptr += first.to(tl.int64) * 2 * columns + column
        tl.store(partial_ptr, tl.sum(gate_sum, axis=0), mask=column < columns)
        tl.store(partial_ptr + columns, tl.sum(up_sum, axis=0), mask=column < columns)


def _tile(name, gate, bias):
    """(ROWS, BLOCK, splits, num_warps)"""
    chosen = launch(f"gated_act/{name}", gate, tuple(gate.shape), elements=ELEMENTS, num_warps=NUM_WARPS)
    rows, block, splits = row_tile(gate.size(1), chosen["elements"])
    if bias is not None and block > WITH_BIAS:
        rows, block, splits = chosen["elements"] // WITH_BIAS, WITH_BIAS, ceil_div(gate.size(1), WITH_BIAS)
    return rows, block, splits, chosen["num_warps"]


def _scaled(gate_multiplier, down_multiplier):
    return gate_multiplier != 1.0 or down_multiplier != 1.0


def gated_act(x, up, bias, activation, gate_multiplier, down_multiplier):
    (gate, linear), bias, _ = operands(x, up, bias)
    y = x.new_empty(gate.shape)
    if y.numel():
        rows, columns = y.shape
        tile, block, splits, warps = _tile("forward", gate, bias)
        _gated_act_forward[(ceil_div(rows, tile) * splits,)](
            gate, linear, bias, y, rows, columns, gate.stride(0), linear.stride(0), splits, gate_multiplier,
            down_multiplier, ACTIVATION=activation, SCALED=_scaled(gate_multiplier, down_multiplier), ROWS=tile,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y


def gated_act_backward(grad_y, x, up, bias, with_bias, activation, gate_multiplier, down_multiplier):
    (gate, linear), bias, grad_y = operands(x, up, bias, grad_y)
    (grad_x, grad_up), (grad_gate, grad_linear) = results(x, up)
    rows, columns = gate.shape
    if not gate.numel():
        return grad_x, grad_up, x.new_zeros(2 * columns if with_bias else 0, dtype=torch.float32)
    tile, block, splits, warps = _tile("backward", gate, bias)
    groups = ceil_div(rows, tile)
    steps = ceil_div(groups * splits, PROGRAMS) if with_bias else 1
    steps = 1 << (steps - 1).bit_length()  # powers of two: each compiles
    groups = ceil_div(groups, steps)
    partial = x.new_empty((groups, 2 * columns), dtype=torch.float32) if with_bias else None
    _gated_act_backward[(groups * splits,)](
        grad_y, gate, linear, bias, grad_gate, grad_linear, partial, rows, columns, grad_y.stride(0), gate.stride(0),
        linear.stride(0), grad_gate.stride(0), splits, gate_multiplier, down_multiplier, ACTIVATION=activation,
        SCALED=_scaled(gate_multiplier, down_multiplier), STEPS=steps, ROWS=tile, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return grad_x, grad_up, partial.sum(0) if with_bias else x.new_empty(0, dtype=torch.float32)
