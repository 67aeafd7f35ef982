"""gru and lstm over a whole sequence in one launch: a program keeps the weights of its hidden units on chip.

The programs of a block of the batch (axis 0 of the grid) share the units of a layer. A step's result is what they
exchange, through global memory, with a barrier among them. `first` and `last` bound the steps of a launch: a launch
of one step passes no barrier, nor does a program that has all units. That is how Triton's interpreter runs them, whose
programs come one after another.
"""

import triton
import triton.language as tl

from genai_fast.kernels.common.activations_triton import sigmoid, tanh
from genai_fast.kernels.common.barrier_triton import arrive, wait
from genai_fast.kernels.common.dot_triton import dot


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_4(ptr, hidden, mask):
    """One value of each of four gates, `hidden` apart."""
    first, second = _load(ptr, mask), _load(ptr + hidden, mask)
    return first, second, _load(ptr + 2 * hidden, mask), _load(ptr + 3 * hidden, mask)


@triton.jit
def _store(ptr, value, mask):
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile(batch, hidden, BLOCK_B: tl.constexpr, UNITS: tl.constexpr):
    """Samples [BLOCK_B, 1] and hidden units [1, UNITS] of this program, and which of them exist."""
    row = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[None, :]
    return row, unit, (row < batch) & (unit < hidden)


@triton.jit
def _meet(counters_ptr, steps):
    """Waits for the programs that share this block of the batch to have done so many steps."""
    if steps > 0 and tl.num_programs(0) > 1:
        wait(counters_ptr + tl.program_id(1) * 32, steps * tl.num_programs(0))  # counters 128 bytes apart


@triton.jit
def _at_step(x_ptr, t, size):
    """Where step t of [T, ...] begins, each step of this size."""
    return x_ptr + (tl.full((), 0, tl.int64) + t) * size


@triton.jit
def _before(first_ptr, x_ptr, t, size):
    """The step before: that of x, or where there is none `first`."""
    before_ptr = first_ptr
    if t > 0:
        before_ptr = _at_step(x_ptr, t - 1, size)
    return before_ptr


@triton.jit
def _columns(weight_ptr, hidden, GATES: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr):
    """weight_hh [GATES H, H] of this program's units, transposed: [WIDTH, 4 UNITS], the gates of a unit together."""
    column = tl.arange(0, 4 * UNITS)[None, :]
    gate, unit = column % 4, tl.program_id(0) * UNITS + column // 4
    k = tl.arange(0, WIDTH)[:, None]
    mask = (gate < GATES) & (unit < hidden) & (k < hidden)
    return tl.load(weight_ptr + (gate * hidden + unit) * hidden + k, mask=mask, other=0.0)


@triton.jit
def _products(
    state_ptr, columns, row, batch, hidden,  # [B, H] from the programs of this block
    BLOCK_B: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The products of the state with each gate's weights, four of [BLOCK_B, UNITS]."""
    k = tl.arange(0, WIDTH)[None, :]
    mask = (row < batch) & (k < hidden)
    state = tl.load(state_ptr + row * hidden + k, mask=mask, other=0.0, cache_modifier=".cg")
    p = dot(state, columns, tl.zeros([BLOCK_B, 4 * UNITS], tl.float32), PRECISION, UPCAST)
    even, odd = tl.split(tl.reshape(p, [BLOCK_B, UNITS, 2, 2]))
    p_0, p_2 = tl.split(even)
    p_1, p_3 = tl.split(odd)
    return p_0, p_1, p_2, p_3


@triton.jit(do_not_specialize=["first", "last", "batch"])
def _gru_sequence(
    gates_ptr, h0_ptr, weight_ptr, bias_ptr,     # [T, B, 3 H], [B, H], [3 H, H], [H] or None
    state_ptr, y_ptr, saved_ptr, counters_ptr,   # [B, H] float32, in place; [T, B, H]; [T, B, 4 H] float32 or None
    first, last, batch, hidden,
    BLOCK_B: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """state = n + z (state - n) with r, z = sigmoid(x + p) and n = tanh(x + r (p + bias)), step after step."""
    row, unit, mask = _tile(batch, hidden, BLOCK_B, UNITS)
    columns = _columns(weight_ptr, hidden, 3, UNITS, WIDTH)
    at = row * hidden + unit
    state = _load(state_ptr + at, mask)
    bias = tl.zeros([1, UNITS], tl.float32)
    if bias_ptr is not None:
        bias = _load(bias_ptr + unit, unit < hidden)
    for t in range(first, last):
        x = _at_step(gates_ptr, t, batch * 3 * hidden) + row * 3 * hidden + unit
        x_r = _load(x, mask)
        x_z = _load(x + hidden, mask)
        x_n = _load(x + 2 * hidden, mask)
        _meet(counters_ptr, t - first)
        h_ptr = _before(h0_ptr, y_ptr, t, batch * hidden)
        p_r, p_z, p_n, _ = _products(h_ptr, columns, row, batch, hidden, BLOCK_B, UNITS, WIDTH, PRECISION, UPCAST)
        r = sigmoid(x_r + p_r)
        z = sigmoid(x_z + p_z)
        n_h = p_n + bias
        n = tanh(x_n + r * n_h)
        state = n + z * (state - n)
        _store(_at_step(y_ptr, t, batch * hidden) + at, state, mask)
        arrive(counters_ptr + tl.program_id(1) * 32)
        if saved_ptr is not None:  # while the others come
            s = _at_step(saved_ptr, t, batch * 4 * hidden) + row * 4 * hidden + unit
            _store(s, r, mask)
            _store(s + hidden, z, mask)
            _store(s + 2 * hidden, n, mask)
            _store(s + 3 * hidden, n_h, mask)
    _store(state_ptr + at, state, mask)


@triton.jit(do_not_specialize=["first", "last", "batch"])
def _lstm_sequence(
    gates_ptr, h0_ptr, weight_ptr,               # [T, B, 4 H], [B, H], [4 H, H]
    cell_ptr, y_ptr, saved_ptr, counters_ptr,    # [B, H] float32, in place; [T, B, H]; [T, B, 5 H] float32 or None
    first, last, batch, hidden,
    BLOCK_B: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """c = f c + i g, y = o tanh(c), step after step."""
    row, unit, mask = _tile(batch, hidden, BLOCK_B, UNITS)
    columns = _columns(weight_ptr, hidden, 4, UNITS, WIDTH)
    at = row * hidden + unit
    c = _load(cell_ptr + at, mask)
    for t in range(first, last):
        x = _at_step(gates_ptr, t, batch * 4 * hidden) + row * 4 * hidden + unit
        x_i, x_f, x_g, x_o = _load_4(x, hidden, mask)
        _meet(counters_ptr, t - first)
        h_ptr = _before(h0_ptr, y_ptr, t, batch * hidden)
        p_i, p_f, p_g, p_o = _products(h_ptr, columns, row, batch, hidden, BLOCK_B, UNITS, WIDTH, PRECISION, UPCAST)
        i = sigmoid(x_i + p_i)
        f = sigmoid(x_f + p_f)
        g = tanh(x_g + p_g)
        o = sigmoid(x_o + p_o)
        c = f * c + i * g
        _store(_at_step(y_ptr, t, batch * hidden) + at, o * tanh(c), mask)
        arrive(counters_ptr + tl.program_id(1) * 32)
        if saved_ptr is not None:  # while the others come
            s = _at_step(saved_ptr, t, batch * 5 * hidden) + row * 5 * hidden + unit
            _store(s, i, mask)
            _store(s + hidden, f, mask)
            _store(s + 2 * hidden, g, mask)
            _store(s + 3 * hidden, o, mask)
            _store(s + 4 * hidden, c, mask)
    _store(cell_ptr + at, c, mask)


@triton.jit
def _rows(weight_ptr, gate, hidden, UNITS: tl.constexpr, WIDTH: tl.constexpr):
    """A gate's rows of weight_hh in the columns of this program's units, [WIDTH, UNITS]."""
    k = tl.arange(0, WIDTH)[:, None]
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[None, :]
    at = weight_ptr + (gate * hidden + k) * hidden + unit
    return tl.load(at, mask=(k < hidden) & (unit < hidden), other=0.0)


@triton.jit
def _gradient(grad_ptr, stride, row, exist, hidden, WIDTH: tl.constexpr):
    """A gate's gradient of the step behind, [B, H] with this row stride: [BLOCK_B, WIDTH] of the rows that `exist`."""
    k = tl.arange(0, WIDTH)[None, :]
    at = grad_ptr + row * stride + k
    return tl.load(at, mask=(row < exist) & (k < hidden), other=0.0, cache_modifier=".cg")


@triton.jit(do_not_specialize=["first", "last", "steps", "batch"])
def _gru_sequence_backward(
    grad_y_ptr, saved_ptr, y_ptr, h0_ptr, weight_ptr,    # [T, B, H] or None, [T, B, 4 H] float32, [T, B, H], [B, H]
    grad_ptr,                                            # [B, H] float32, in place: of the state
    grad_gates_ptr, grad_n_ptr, counters_ptr,            # [T, B, 3 H], [T, B, H]
    first, last, steps, batch, hidden,
    BLOCK_B: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Steps first .. last - 1, counted from the sequence's end; the product that gives h0's gradient is left out."""
    row, unit, mask = _tile(batch, hidden, BLOCK_B, UNITS)
    weight_r = _rows(weight_ptr, 0, hidden, UNITS, WIDTH)
    weight_z = _rows(weight_ptr, 1, hidden, UNITS, WIDTH)
    weight_n = _rows(weight_ptr, 2, hidden, UNITS, WIDTH)
    at = row * hidden + unit
    grad = _load(grad_ptr + at, mask)
    for back in range(first, last):
        t = steps - 1 - back
        s = _at_step(saved_ptr, t, batch * 4 * hidden) + row * 4 * hidden + unit
        r, z, n, n_h = _load_4(s, hidden, mask)
        before = _load(_before(h0_ptr, y_ptr, t, batch * hidden) + at, mask)
        if grad_y_ptr is not None:
            grad += _load(_at_step(grad_y_ptr, t, batch * hidden) + at, mask)
        _meet(counters_ptr, back - first)
        exist = batch * tl.minimum(back, 1)  # behind the sequence's end there is nothing
        behind = _at_step(grad_gates_ptr, t + 1, batch * 3 * hidden)
        d_r = _gradient(behind, 3 * hidden, row, exist, hidden, WIDTH)
        d_z = _gradient(behind + hidden, 3 * hidden, row, exist, hidden, WIDTH)
        behind = _at_step(grad_n_ptr, t + 1, batch * hidden)
        d_n = _gradient(behind, hidden, row, exist, hidden, WIDTH)
        zero = tl.zeros([BLOCK_B, UNITS], tl.float32)
        products = dot(d_r, weight_r, zero, PRECISION, UPCAST) + dot(d_z, weight_z, zero, PRECISION, UPCAST)
        products += dot(d_n, weight_n, zero, PRECISION, UPCAST)
        grad += tl.where(row < exist, products, 0.0)
        g_n = grad * (1.0 - z) * (1.0 - n * n)
        wide = _at_step(grad_gates_ptr, t, batch * 3 * hidden) + row * 3 * hidden + unit
        _store(wide, g_n * n_h * (r * (1.0 - r)), mask)
        _store(wide + hidden, grad * (before - n) * (z * (1.0 - z)), mask)
        _store(_at_step(grad_n_ptr, t, batch * hidden) + at, g_n * r, mask)
        arrive(counters_ptr + tl.program_id(1) * 32)
        _store(wide + 2 * hidden, g_n, mask)
        grad *= z
    _store(grad_ptr + at, grad, mask)


@triton.jit(do_not_specialize=["first", "last", "steps", "batch"])
def _lstm_sequence_backward(
    grad_y_ptr, grad_h_ptr, saved_ptr, c0_ptr, weight_ptr,  # [T, B, H], [B, H], or None; [T, B, 5 H] float32; [B, H]
    grad_ptr, grad_gates_ptr, counters_ptr,                 # [B, H] float32, in place: of the cell; [T, B, 4 H]
    first, last, steps, batch, hidden,
    BLOCK_B: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Steps first .. last - 1, counted from the sequence's end; the product that gives h0's gradient is left out."""
    row, unit, mask = _tile(batch, hidden, BLOCK_B, UNITS)
    weight_i = _rows(weight_ptr, 0, hidden, UNITS, WIDTH)
    weight_f = _rows(weight_ptr, 1, hidden, UNITS, WIDTH)
    weight_g = _rows(weight_ptr, 2, hidden, UNITS, WIDTH)
    weight_o = _rows(weight_ptr, 3, hidden, UNITS, WIDTH)
    at = row * hidden + unit
    carry = _load(grad_ptr + at, mask)
    for back in range(first, last):
        t = steps - 1 - back
        s = _at_step(saved_ptr, t, batch * 5 * hidden) + row * 5 * hidden + unit
        i, f, g, o = _load_4(s, hidden, mask)
        c = _load(s + 4 * hidden, mask)
        before = _load(s + 4 * hidden - batch * 5 * hidden, mask & (t > 0)) + _load(c0_ptr + at, mask & (t == 0))
        grad = tl.zeros([BLOCK_B, UNITS], tl.float32)
        if grad_y_ptr is not None:
            grad += _load(_at_step(grad_y_ptr, t, batch * hidden) + at, mask)
        if grad_h_ptr is not None:
            grad += _load(grad_h_ptr + at, mask & (back == 0))
        _meet(counters_ptr, back - first)
        exist = batch * tl.minimum(back, 1)  # behind the sequence's end there is nothing
        behind = _at_step(grad_gates_ptr, t + 1, batch * 4 * hidden)
        d_i = _gradient(behind, 4 * hidden, row, exist, hidden, WIDTH)
        d_f = _gradient(behind + hidden, 4 * hidden, row, exist, hidden, WIDTH)
        d_g = _gradient(behind + 2 * hidden, 4 * hidden, row, exist, hidden, WIDTH)
        d_o = _gradient(behind + 3 * hidden, 4 * hidden, row, exist, hidden, WIDTH)
        zero = tl.zeros([BLOCK_B, UNITS], tl.float32)
        products = dot(d_f, weight_f, dot(d_i, weight_i, zero, PRECISION, UPCAST), PRECISION, UPCAST)
        products += dot(d_o, weight_o, dot(d_g, weight_g, zero, PRECISION, UPCAST), PRECISION, UPCAST)
        grad += tl.where(row < exist, products, 0.0)
        a = tanh(c)
        carry += grad * o * (1.0 - a * a)
        wide = _at_step(grad_gates_ptr, t, batch * 4 * hidden) + row * 4 * hidden + unit
        _store(wide, carry * g * (i * (1.0 - i)), mask)
        _store(wide + hidden, carry * before * (f * (1.0 - f)), mask)
        _store(wide + 2 * hidden, carry * i * (1.0 - g * g), mask)
        _store(wide + 3 * hidden, grad * a * (o * (1.0 - o)), mask)
        arrive(counters_ptr + tl.program_id(1) * 32)
        carry *= f
    _store(grad_ptr + at, carry, mask)
