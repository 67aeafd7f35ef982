"""What the kernels of causal_attention share: where tiles lie, which keys a query sees, what dropout keeps.

A query of local row i stands at position i + keys - queries among the keys of its sequence. It sees the keys from
`below` before its position to `above` behind it.
"""

import triton
import triton.language as tl

from genai_fast.kernels.common.philox_triton import words


@triton.jit
def sequence_of(starts_ptr, index, count):
    """(first row, rows) of a sequence: all `count`, or where packed ones are cut apart."""
    if starts_ptr is not None:
        begin = tl.load(starts_ptr + index)
        count = tl.load(starts_ptr + index + 1) - begin
    else:
        begin = 0
    return begin, count


@triton.jit
def wide(x):
    """As 64 bits; x may be an integer of Python's."""
    return tl.full((), 0, tl.int64) + x


@triton.jit
def head_at(x_ptr, sample, head, begin, batch_stride, head_stride, row_stride):
    """Where row `begin` of a head lies."""
    return x_ptr + (wide(sample) * batch_stride + wide(head) * head_stride + wide(begin) * row_stride)


@triton.jit
def dense_at(x_ptr, sample, head, begin, heads, rows, D: tl.constexpr, INSIDE: tl.constexpr):
    """(where row `begin` of a head of a dense tensor lies, its row stride): [B, rows, H, D] if INSIDE, else as told."""
    if INSIDE:
        stride = heads * D
        at = x_ptr + ((wide(sample) * rows + begin) * heads + head) * D
    else:
        stride = D
        at = x_ptr + ((wide(sample) * heads + head) * rows + begin) * D
    return at, stride


@triton.jit
def rows_of(x_ptr, row, stride, count, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """Rows from `row` on, [BLOCK, BLOCK_D]: 0 in channels behind D and, if MASK, in rows behind `count`."""
    offs = tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    at = x_ptr + wide(row) * stride + (offs * stride + channel)
    if MASK:
        mask = row + offs < count
        if D < BLOCK_D:
            mask &= channel < D
        x = tl.load(at, mask=mask, other=0.0)
    elif D < BLOCK_D:
        x = tl.load(at, mask=channel < D, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def store_rows(x_ptr, x, row, stride, count, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    at = x_ptr + wide(row) * stride + (offs * stride + channel)
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=(row + offs < count) & (channel < D))


@triton.jit
def span(first, last, below, above, count, LOWER: tl.constexpr, UPPER: tl.constexpr, BLOCK: tl.constexpr):
    """Which blocks meet rows first .. last, where row r meets r - below .. r + above of `count`: those from `start` to
    `end`. From `whole` to `rest` each of them exists and meets every row. All but `end` are multiples of BLOCK.
    """
    start = 0
    whole = 0
    end = count
    rest = count // BLOCK * BLOCK
    if LOWER:
        start = tl.maximum(first - below, 0) // BLOCK * BLOCK
        whole = (tl.maximum(last - below, 0) + (BLOCK - 1)) // BLOCK * BLOCK
    if UPPER:
        end = tl.minimum(last + above + 1, count)
        rest = tl.maximum(tl.minimum(first + above + 1, count), 0) // BLOCK * BLOCK
    return start, whole, tl.maximum(rest, whole), end


@triton.jit
def seen(position, key, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Whether a query at `position` sees `key`; both broadcast."""
    back = position - key
    if CAUSAL:  # noqa: SIM108
        mask = back >= 0  # no row that exists stands behind the last key
    else:
        mask = key < keys
    if WINDOWED:
        mask &= back < window
        if not CAUSAL:
            mask &= back > -window
    return mask


@triton.jit
def _one_of(n, w0, w1, w2, w3):
    """The n-th."""
    return tl.where(n < 2, tl.where(n == 0, w0, w1), tl.where(n == 2, w2, w3))


@triton.jit
def kept(seed, row, offset, pitch, column, bound, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Whether dropout keeps the words of int64 rows [R] in columns column .. column + BLOCK - 1, bool [R, BLOCK].

    A Philox call serves four columns if `column` is a multiple of 4 (ALIGNED), as `pitch` is; else it takes two.
    """
    counter = (((row + offset) * pitch + column) >> 2)[:, None] + tl.arange(0, BLOCK // 4)[None, :]
    w0, w1, w2, w3 = words(seed, counter)
    if not ALIGNED:
        w4, w5, w6, _ = words(seed, counter + 1)
        n = column & 3
        w0, w1, w2, w3 = (
            _one_of(n, w0, w1, w2, w3),
            _one_of(n, w1, w2, w3, w4),
            _one_of(n, w2, w3, w4, w5),
            _one_of(n, w3, w4, w5, w6),
        )
    stream = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [row.shape[0], BLOCK])
    return stream > bound.to(tl.uint32, bitcast=True)
