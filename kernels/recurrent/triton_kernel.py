"""gru and lstm on the GPU: a whole sequence in one launch where the weights fit on chip (sequence_triton.py), else
each step is PyTorch's matrix product with weight_hh and one kernel for the rest.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common import launch
from genai_fast.kernels.common.activations_triton import sigmoid, tanh
from genai_fast.kernels.common.extension import interpreting
from genai_fast.kernels.common.launch import ceil_div, next_power_of_2
from genai_fast.kernels.common.recorder import reads
from genai_fast.kernels.recurrent import tiles
from genai_fast.kernels.recurrent.reference import require
from genai_fast.kernels.recurrent.sequence_triton import (
    _gru_sequence,
    _gru_sequence_backward,
    _lstm_sequence,
    _lstm_sequence_backward,
)

MOST_UNITS = 512  # of a program
NUM_WARPS = 4


@triton.jit
def _units(hidden, BLOCK: tl.constexpr):
    """Row of the batch, hidden units [BLOCK] of this program, and which of them exist."""
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(0).to(tl.int64), unit, unit < hidden


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, value, mask):
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gru_step(
    gates_ptr, products_ptr, bias_ptr,       # [B, 3 H] of the input and of the state, [H] or None
    state_ptr, y_ptr, saved_ptr,             # [B, H] float32, in place; [B, H]; [B, 4 H] float32 or None
    hidden, BLOCK: tl.constexpr,
):  # fmt: skip
    """state = n + z (state - n) with r, z = sigmoid(x + p) and n = tanh(x + r (p + bias))."""
    row, unit, mask = _units(hidden, BLOCK)
    x = gates_ptr + row * 3 * hidden + unit
    p = products_ptr + row * 3 * hidden + unit
    r = sigmoid(_load(x, mask) + _load(p, mask))
    z = sigmoid(_load(x + hidden, mask) + _load(p + hidden, mask))
    n_h = _load(p + 2 * hidden, mask)
    if bias_ptr is not None:
        n_h += _load(bias_ptr + unit, mask)
    n = tanh(_load(x + 2 * hidden, mask) + r * n_h)
    at = row * hidden + unit
    state = n + z * (_load(state_ptr + at, mask) - n)
    _store(state_ptr + at, state, mask)
    _store(y_ptr + at, state, mask)
    if saved_ptr is not None:
        s = saved_ptr + row * 4 * hidden + unit
        _store(s, r, mask)
        _store(s + hidden, z, mask)
        _store(s + 2 * hidden, n, mask)
        _store(s + 3 * hidden, n_h, mask)


@triton.jit
def _gru_step_backward(
    grad_y_ptr, products_ptr,                # [B, H] or None: gradients of y, and of y through the step after
    saved_ptr, before_ptr,                   # [B, 4 H] float32, [B, H]: the state before
    grad_ptr,                                # [B, H] float32, in place: of the state
    grad_gates_ptr, grad_n_ptr, factor_ptr,  # [B, 3 H], [B, H], [B, 3 H]: what meets weight_hh
    hidden, BLOCK: tl.constexpr,
):  # fmt: skip
    row, unit, mask = _units(hidden, BLOCK)
    at = row * hidden + unit
    grad = _load(grad_ptr + at, mask)
    if grad_y_ptr is not None:
        grad += _load(grad_y_ptr + at, mask)
    if products_ptr is not None:
        grad += _load(products_ptr + at, mask)
    s = saved_ptr + row * 4 * hidden + unit
    r = _load(s, mask)
    z = _load(s + hidden, mask)
    n = _load(s + 2 * hidden, mask)
    d_n = grad * (1.0 - z) * (1.0 - n * n)
    d_r = d_n * _load(s + 3 * hidden, mask) * (r * (1.0 - r))
    d_z = grad * (_load(before_ptr + at, mask) - n) * (z * (1.0 - z))
    wide_at = row * 3 * hidden + unit
    _store(grad_gates_ptr + wide_at, d_r, mask)
    _store(grad_gates_ptr + wide_at + hidden, d_z, mask)
    _store(grad_gates_ptr + wide_at + 2 * hidden, d_n, mask)
    _store(factor_ptr + wide_at, d_r, mask)
    _store(factor_ptr + wide_at + hidden, d_z, mask)
    _store(factor_ptr + wide_at + 2 * hidden, d_n * r, mask)
    _store(grad_n_ptr + at, d_n * r, mask)
    _store(grad_ptr + at, grad * z, mask)


@triton.jit
def _lstm_step(
    gates_ptr,
    products_ptr,  # [B, 4 H] of the input and of the state
    cell_ptr,
    y_ptr,
    saved_ptr,  # [B, H] float32, in place; [B, H]; [B, 5 H] float32 or None
    hidden,
    BLOCK: tl.constexpr,
):
    """c = f c + i g, y = o tanh(c)."""
    row, unit, mask = _units(hidden, BLOCK)
    x = gates_ptr + row * 4 * hidden + unit
    p = products_ptr + row * 4 * hidden + unit
    i = sigmoid(_load(x, mask) + _load(p, mask))
    f = sigmoid(_load(x + hidden, mask) + _load(p + hidden, mask))
    g = tanh(_load(x + 2 * hidden, mask) + _load(p + 2 * hidden, mask))
    o = sigmoid(_load(x + 3 * hidden, mask) + _load(p + 3 * hidden, mask))
    at = row * hidden + unit
    c = f * _load(cell_ptr + at, mask) + i * g
    _store(cell_ptr + at, c, mask)
    _store(y_ptr + at, o * tanh(c), mask)
    if saved_ptr is not None:
        s = saved_ptr + row * 5 * hidden + unit
        _store(s, i, mask)
        _store(s + hidden, f, mask)
        _store(s + 2 * hidden, g, mask)
        _store(s + 3 * hidden, o, mask)
        _store(s + 4 * hidden, c, mask)


@triton.jit
def _lstm_step_backward(
    grad_y_ptr,
    products_ptr,  # [B, H] or None: gradients of y, and of y through the step after
    saved_ptr,
    before_ptr,
    before_stride,  # [B, 5 H] float32; [B, H] with this row stride: the cell before
    grad_ptr,  # [B, H] float32, in place: of the cell
    grad_gates_ptr,  # [B, 4 H]
    hidden,
    BLOCK: tl.constexpr,
):
    row, unit, mask = _units(hidden, BLOCK)
    at = row * hidden + unit
    grad = tl.zeros([BLOCK], tl.float32)
    if grad_y_ptr is not None:
        grad += _load(grad_y_ptr + at, mask)
    if products_ptr is not None:
        grad += _load(products_ptr + at, mask)
    s = saved_ptr + row * 5 * hidden + unit
    i = _load(s, mask)
    f = _load(s + hidden, mask)
    g = _load(s + 2 * hidden, mask)
    o = _load(s + 3 * hidden, mask)
    a = tanh(_load(s + 4 * hidden, mask))
    carry = _load(grad_ptr + at, mask) + grad * o * (1.0 - a * a)
    d = grad_gates_ptr + row * 4 * hidden + unit
    _store(d, carry * g * (i * (1.0 - i)), mask)
    _store(d + hidden, carry * _load(before_ptr + row * before_stride + unit, mask) * (f * (1.0 - f)), mask)
    _store(d + 2 * hidden, carry * i * (1.0 - g * g), mask)
    _store(d + 3 * hidden, grad * a * (o * (1.0 - o)), mask)
    _store(grad_ptr + at, carry * f, mask)


def _sizes(rows, gates, h0, weight_hh):
    """(steps, batch, hidden), once the tensors are known to have them; `rows` is [T, B, ...]."""
    steps, (batch, hidden) = rows.size(0), h0.shape
    require(rows, (rows, (steps, batch, rows.size(-1))), (h0, (batch, hidden)))
    require(rows, (weight_hh, (gates * hidden, hidden)))
    return steps, batch, hidden


def _launch(batch, hidden):
    """Grid and constants."""
    block = min(next_power_of_2(hidden), MOST_UNITS)
    return (batch, ceil_div(hidden, block)), dict(BLOCK=block, num_warps=NUM_WARPS)


def _state(x, batch, hidden, like):
    """A float32 copy of a state to be updated in place; zeros for None."""
    state = like.new_zeros((batch, hidden), dtype=torch.float32)
    return state if x is None else state.copy_(x)


def _dense(x):
    return x if x is None else x.contiguous()


def _of_step(x, t):
    return x if x is None else x[t]


def _room(device):
    """(multiprocessors, bytes of shared memory, hidden units) for tiles.plan; none where programs cannot meet."""
    found = launch.properties(device)
    if found is None:
        return 2**20, 2**30, 128  # interpreted: the fewer programs, the better
    if torch.version.hip is not None or reads(lambda: os.environ.get("GENAI_FAST_SEQUENCE", "1")) == "0":
        return 0, 0, 0
    return found.multi_processor_count, found.shared_memory_per_block_optin, 0


def planned(like, batch, hidden, backward):
    """Grid and constants of one launch for the whole sequence of tensors `like` this, or None."""
    tf32 = launch.compiled(like) and reads(lambda: torch.backends.cuda.matmul.fp32_precision) == "tf32"
    exact = launch.compiled(like) and like.dtype is torch.float32 and not tf32
    found = tiles.plan(batch, hidden, like.element_size(), backward, exact, *_room(like.device))
    if found is None:
        return None
    upcast = interpreting() and like.dtype is torch.bfloat16
    return found[0], dict(found[1], PRECISION="tf32" if tf32 else "ieee", UPCAST=upcast)


def steps_a_launch(steps: int, grid: tuple[int, int]) -> int:
    """All; but programs that come one after another cannot wait for each other."""
    return 1 if interpreting() and grid[0] > 1 else steps


def _run(kernel, plan, like, tensors, steps, *sizes):
    """The whole sequence; the barrier's counters are set anew in every launch, also in one of a captured graph."""
    grid, constants = plan
    share = steps_a_launch(steps, grid)
    for first in range(0, steps, share):
        counters, last = like.new_zeros((grid[1], 32), dtype=torch.int32), min(first + share, steps)
        kernel[grid](*tensors, counters, first, last, *sizes, **constants, launch_cooperative_grid=True)


def gru(gates, h0, weight_hh, bias_n, keep):
    steps, batch, hidden = _sizes(gates, 3, h0, weight_hh)
    require(gates, (gates, (steps, batch, 3 * hidden)), (bias_n, (hidden,)))
    gates, h, bias_n = _dense(gates), _dense(h0), _dense(bias_n)
    y, state = gates.new_empty(steps, batch, hidden), _state(h0, batch, hidden, gates)
    saved = state.new_empty(steps, batch, 4 * hidden) if keep else None
    plan = planned(gates, batch, hidden, False)
    if plan:
        tensors = gates, h, _dense(weight_hh), bias_n, state, y, saved
        _run(_gru_sequence, plan, gates, tensors, steps, batch, hidden)
        steps = 0
    grid, constants = _launch(batch, hidden)
    for t in range(steps if batch else 0):
        products = torch.mm(h, weight_hh.t())
        _gru_step[grid](gates[t], products, bias_n, state, y[t], _of_step(saved, t), hidden, **constants)
        h = y[t]
    return y, y[-1].clone(), state.new_empty(0) if saved is None else saved


def gru_backward(grad_y, grad_last, saved, y, h0, weight_hh):
    steps, batch, hidden = _sizes(y, 3, h0, weight_hh)
    require(y, (grad_y, y.shape), (grad_last, (batch, hidden)), (saved, (steps, batch, 4 * hidden)))
    grad_y, saved, y, h0 = map(_dense, (grad_y, saved, y, h0))
    grad_gates, grad_n = y.new_empty(steps, batch, 3 * hidden), torch.empty_like(y)
    grad, factor, products = _state(grad_last, batch, hidden, y), y.new_empty(batch, 3 * hidden), None
    plan = planned(y, batch, hidden, True)
    if plan:
        tensors = grad_y, saved, y, h0, _dense(weight_hh), grad, grad_gates, grad_n
        _run(_gru_sequence_backward, plan, y, tensors, steps, steps, batch, hidden)
        products, steps = torch.mm(torch.cat((grad_gates[0, :, : 2 * hidden], grad_n[0]), 1), weight_hh), 0
    grid, constants = _launch(batch, hidden)
    for t in reversed(range(steps if batch else 0)):
        before = y[t - 1] if t else h0
        _gru_step_backward[grid](
            _of_step(grad_y, t), products, saved[t], before, grad, grad_gates[t], grad_n[t], factor, hidden, **constants
        )
        products = torch.mm(factor, weight_hh)
    return grad_gates, grad_n, (grad if products is None else grad + products).to(y.dtype)


def lstm(gates, h0, c0, weight_hh, keep):
    steps, batch, hidden = _sizes(gates, 4, h0, weight_hh)
    require(gates, (gates, (steps, batch, 4 * hidden)), (c0, (batch, hidden)))
    gates, h = _dense(gates), _dense(h0)
    y, cell = gates.new_empty(steps, batch, hidden), _state(c0, batch, hidden, gates)
    saved = cell.new_empty(steps, batch, 5 * hidden) if keep else None
    plan = planned(gates, batch, hidden, False)
    if plan:
        tensors = gates, h, _dense(weight_hh), cell, y, saved
        _run(_lstm_sequence, plan, gates, tensors, steps, batch, hidden)
        steps = 0
    grid, constants = _launch(batch, hidden)
    for t in range(steps if batch else 0):
        products = torch.mm(h, weight_hh.t())
        _lstm_step[grid](gates[t], products, cell, y[t], _of_step(saved, t), hidden, **constants)
        h = y[t]
    return y, y[-1].clone(), cell.to(y.dtype), cell.new_empty(0) if saved is None else saved


def lstm_backward(grad_y, grad_h, grad_c, saved, c0, weight_hh):
    steps, batch, hidden = _sizes(saved, 4, c0, weight_hh)
    state = (batch, hidden)
    require(saved, (saved, (steps, batch, 5 * hidden)), (grad_y, (steps, *state)), (grad_h, state), (grad_c, state))
    grad_y, saved, c0, products = map(_dense, (grad_y, saved, c0, grad_h))
    grad_gates = weight_hh.new_empty(steps, batch, 4 * hidden)
    grad = _state(grad_c, batch, hidden, weight_hh)
    plan = planned(weight_hh, batch, hidden, True)
    if plan:
        tensors = grad_y, products, saved, c0, _dense(weight_hh), grad, grad_gates
        _run(_lstm_sequence_backward, plan, grad, tensors, steps, steps, batch, hidden)
        products, steps = torch.mm(grad_gates[0], weight_hh), 0
    grid, constants = _launch(batch, hidden)
    for t in reversed(range(steps if batch else 0)):
        before, stride = (saved[t - 1, :, 4 * hidden :], 5 * hidden) if t else (c0, hidden)
        _lstm_step_backward[grid](
            _of_step(grad_y, t), products, saved[t], before, stride, grad, grad_gates[t], hidden, **constants
        )
        products = torch.mm(grad_gates[t], weight_hh)
    grad_h0 = products if batch else torch.zeros_like(grad)
    return grad_gates, grad_h0.to(weight_hh.dtype), grad.to(weight_hh.dtype)
