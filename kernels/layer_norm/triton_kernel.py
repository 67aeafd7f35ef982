"""layer_norm and rms_norm on the GPU: rows in registers, or in blocks where they are long; no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common.channels import require_channels
from genai_fast.kernels.common.launch import ceil_div, next_power_of_2, row_tile
from genai_fast.kernels.common.rows import as_matrix, dense_like, require_alike, require_rows
from genai_fast.kernels.common.tuned import launch

LONGEST = 8192  # columns that a program holds in registers; half of them in layer_norm's backward, whose sums are two
A_WARP, A_WARP_LONG, BACKWARD = 1024, 512, 256  # elements of a warp: whole rows, parts of them, and in backward
WARPS = 2112  # that share the rows in forward, 16 for each multiprocessor of an H100: a program reads the weight once
PROGRAMS = 264  # that share the rows in backward, each with its sums: enough for every GPU, few enough to add up
BLOCK, LONG_WARPS = 2048, 8  # of a longer row
SUM_ROWS, SUM_COLUMNS, SUM_PROGRAMS = 16, 128, 32  # a tile of the sums of longer rows, and programs that share them
ADD_ROWS, ADD_COLUMNS, NUM_WARPS = 64, 16, 4  # a tile of the last step


@triton.jit
def _sum(x_ptr, residual_ptr, x_offs, residual_offs, mask):
    """h = x + residual, rounded as it is written."""
    h = tl.load(x_ptr + x_offs, mask=mask, other=0.0)
    if residual_ptr is not None:
        added = tl.load(residual_ptr + residual_offs, mask=mask, other=0.0)
        h = (h.to(tl.float32) + added.to(tl.float32)).to(x_ptr.dtype.element_ty)
    return h.to(tl.float32)


@triton.jit
def _scaled(x_hat, weight_ptr, bias_ptr, column, inside):
    """x-hat weight + bias."""
    if weight_ptr is not None:
        x_hat *= tl.load(weight_ptr + column, mask=inside, other=0.0)[None, :]
    if bias_ptr is not None:
        x_hat += tl.load(bias_ptr + column, mask=inside, other=0.0)[None, :]
    return x_hat


@triton.jit
def _rounded(x, like_ptr):
    """x as that dtype holds it."""
    return x.to(like_ptr.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _layer_norm_forward(
    x_ptr, residual_ptr,                     # [rows, columns], the second may be None
    weight_ptr, bias_ptr,                    # [columns] or None
    y_ptr, h_ptr,                            # [rows, columns]; h is None without a residual
    mean_ptr, rstd_ptr,                      # [rows]; no mean: RMS
    rows, columns, x_stride, residual_stride, eps, tiles,
    CASTING: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h = x + residual, y = (h - mean) rstd weight + bias; whole rows at a time. CASTING: see reference.py."""
    column = tl.arange(0, BLOCK)
    inside = column < columns
    across = column[None, :]
    for tile in range(tiles):
        # rows * columns passes 2**31
        row = (tl.program_id(0) * tiles + tile).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        h = _sum(x_ptr, residual_ptr, row[:, None] * x_stride + across, row[:, None] * residual_stride + across, mask)
        offs = row[:, None] * columns + across
        if h_ptr is not None:
            tl.store(h_ptr + offs, h.to(h_ptr.dtype.element_ty), mask=mask)
        if mean_ptr is not None:
            mean = tl.sum(h, axis=1) / columns
            h = tl.where(mask, h - mean[:, None], 0.0)
            lost = tl.sum(h, axis=1) / columns  # to rounding, where the mean is far from 0
            h = tl.where(mask, h - lost[:, None], 0.0)
            tl.store(mean_ptr + row, mean + lost, mask=row < rows)
        if CASTING == "none":
            mean_square = _rounded(tl.sum(_rounded(h * h, x_ptr), axis=1) / columns, x_ptr)
            rstd = _rounded(1.0 / tl.sqrt(_rounded(mean_square + eps, x_ptr)), x_ptr)
        else:
            rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=1) / columns + eps)
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
        h *= rstd[:, None]
        if CASTING != "gemma":
            h = _rounded(h, x_ptr)
        y = _scaled(h, weight_ptr, bias_ptr, column, inside)
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_forward_long(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,  # as above
    columns, x_stride, residual_stride, eps,
    CASTING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same, one row a program, read three times (RMS: twice)."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
    mean = 0.0
    if mean_ptr is not None:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, columns, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            total += _sum(x_ptr, residual_ptr, offs, offs, offs < columns)
        mean = tl.sum(total, axis=0) / columns
    lost = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        h = _sum(x_ptr, residual_ptr, offs, offs, offs < columns)
        d = tl.where(offs < columns, h - mean, 0.0)
        lost += d
        square += _rounded(d * d, x_ptr) if CASTING == "none" else d * d
    rest = 0.0
    if mean_ptr is not None:
        rest = tl.sum(lost, axis=0) / columns
        tl.store(mean_ptr + row, mean + rest)
    variance = tl.sum(square, axis=0) / columns - rest * rest
    if CASTING == "none":
        rstd = _rounded(1.0 / tl.sqrt(_rounded(_rounded(variance, x_ptr) + eps, x_ptr)), x_ptr)
    else:
        rstd = 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)  # rounding; NaN stays
    tl.store(rstd_ptr + row, rstd)
    for first in range(0, columns, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        inside = offs < columns
        h = _sum(x_ptr, residual_ptr, offs, offs, inside)
        if h_ptr is not None:
            tl.store(h_ptr + row * columns + offs, h.to(h_ptr.dtype.element_ty), mask=inside)
        y = ((h - mean) - rest) * rstd
        if CASTING != "gemma":
            y = _rounded(y, x_ptr)
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + offs, mask=inside, other=0.0)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs, mask=inside, other=0.0)
        tl.store(y_ptr + row * columns + offs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _layer_norm_backward(
    grad_y_ptr, grad_h_ptr, h_ptr,           # [rows, columns], the second may be None
    weight_ptr,                              # [columns] or None
    mean_ptr, rstd_ptr,                      # [rows]; no mean: RMS
    grad_x_ptr,                              # [rows, columns]
    weight_sums_ptr, bias_sums_ptr,          # [programs, columns] or None
    rows, columns, grad_y_stride, grad_h_stride, h_stride, tiles,
    CASTING: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g - mean(g) - x-hat mean(g x-hat)) + dh, g = dy weight; this program's sums of dy x-hat and dy."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    across = column[None, :]
    if weight_ptr is not None and BLOCK < 4096:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)[None, :]
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        down = row[:, None]
        g = tl.load(grad_y_ptr + down * grad_y_stride + across, mask=mask, other=0.0).to(tl.float32)
        x_hat = tl.load(h_ptr + down * h_stride + across, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        if mean_ptr is not None:
            x_hat -= tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        x_hat = tl.where(mask, x_hat * rstd, 0.0)
        if weight_sums_ptr is not None:
            weight_sum += g * (x_hat if CASTING == "gemma" else _rounded(x_hat, h_ptr))
        if bias_sums_ptr is not None:
            bias_sum += g
        if weight_ptr is not None:
            if BLOCK >= 4096:  # from the cache each time: held over the loop, it would make them spill registers
                weight = tl.load(weight_ptr + column, mask=inside, other=0.0)[None, :]
            g *= weight
        dx = g - x_hat * (tl.sum(g * x_hat, axis=1) / columns)[:, None]
        if mean_ptr is not None:
            dx -= (tl.sum(g, axis=1) / columns)[:, None]
        dx *= rstd
        if grad_h_ptr is not None:
            dx += tl.load(grad_h_ptr + down * grad_h_stride + across, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + down * columns + across, dx.to(grad_x_ptr.dtype.element_ty), mask=mask)
    at = program.to(tl.int64) * columns + column
    if weight_sums_ptr is not None:
        tl.store(weight_sums_ptr + at, tl.sum(weight_sum, axis=0), mask=inside)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + at, tl.sum(bias_sum, axis=0), mask=inside)


@triton.jit
def _layer_norm_backward_long(
    grad_y_ptr, grad_h_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr,  # as above
    columns, grad_y_stride, grad_h_stride, h_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The same dx, one row a program, read twice."""
    row = tl.program_id(0).to(tl.int64)
    grad_y_ptr += row * grad_y_stride
    h_ptr += row * h_stride
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        inside = offs < columns
        g = tl.load(grad_y_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + offs, mask=inside, other=0.0)
        total += g
        product += tl.where(inside, g * ((h - mean) * rstd), 0.0)
    second = tl.sum(product, axis=0) / columns
    constant = 0.0
    if mean_ptr is not None:
        constant = tl.sum(total, axis=0) / columns
    for first in range(0, columns, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        inside = offs < columns
        g = tl.load(grad_y_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + offs, mask=inside, other=0.0)
        dx = (g - (h - mean) * rstd * second - constant) * rstd
        if grad_h_ptr is not None:
            dx += tl.load(grad_h_ptr + row * grad_h_stride + offs, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * columns + offs, dx.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _layer_norm_sums_long(
    grad_y_ptr, h_ptr, mean_ptr, rstd_ptr,   # [rows, columns] twice, [rows] twice
    weight_sums_ptr, bias_sums_ptr,          # [programs / blocks of columns, columns] or None
    rows, columns, grad_y_stride, h_stride, tiles,
    CASTING: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's sums of dy x-hat and of dy: `tiles` tiles of rows by a block of columns."""
    blocks = tl.cdiv(columns, BLOCK)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    inside = column < columns
    across = column[None, :]
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tiles):
        row = (group * tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        down = row[:, None]
        g = tl.load(grad_y_ptr + down * grad_y_stride + across, mask=mask, other=0.0).to(tl.float32)
        if weight_sums_ptr is not None:
            h = tl.load(h_ptr + down * h_stride + across, mask=mask, other=0.0).to(tl.float32)
            if mean_ptr is not None:
                h -= tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
            x_hat = h * rstd[:, None]
            weight_sum += tl.where(mask, g * (x_hat if CASTING == "gemma" else _rounded(x_hat, h_ptr)), 0.0)
        bias_sum += g
    at = group * columns + column
    if weight_sums_ptr is not None:
        tl.store(weight_sums_ptr + at, tl.sum(weight_sum, axis=0), mask=inside)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + at, tl.sum(bias_sum, axis=0), mask=inside)


@triton.jit(do_not_specialize=["programs"])
def _layer_norm_add(
    weight_sums_ptr, bias_sums_ptr,          # [programs, columns] or None
    weight_total_ptr, bias_total_ptr,        # [columns] or None
    programs, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The programs' sums added in their order: a half of the grid for each, or all of it for the one."""
    blocks = tl.cdiv(columns, BLOCK)
    if tl.program_id(0) < blocks:
        if weight_sums_ptr is not None:
            _add(weight_sums_ptr, weight_total_ptr, tl.program_id(0), programs, columns, ROWS, BLOCK)
        else:
            _add(bias_sums_ptr, bias_total_ptr, tl.program_id(0), programs, columns, ROWS, BLOCK)
    elif bias_sums_ptr is not None:
        _add(bias_sums_ptr, bias_total_ptr, tl.program_id(0) - blocks, programs, columns, ROWS, BLOCK)


@triton.jit
def _add(sums_ptr, total_ptr, block, programs, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, programs, ROWS):
        program = first + tl.arange(0, ROWS)
        mask = (program < programs)[:, None] & inside[None, :]
        total += tl.load(sums_ptr + program[:, None].to(tl.int64) * columns + column[None, :], mask=mask, other=0.0)
    tl.store(total_ptr + column, tl.sum(total, axis=0), mask=inside)


def _tile(name, matrix, rms, elements, warps):
    """ROWS, BLOCK and warps of programs that hold whole rows, of at least this many elements."""
    chosen = launch(
        f"layer_norm/{'rms_' if rms else ''}{name}", matrix, tuple(matrix.shape), elements=elements, num_warps=warps
    )
    rows, block, _ = row_tile(matrix.size(1), max(chosen["elements"], next_power_of_2(matrix.size(1))))
    return dict(ROWS=rows, BLOCK=block, num_warps=chosen["num_warps"])


def _forward_tile(matrix, rms):
    """A row is one warp's, which needs no barrier to sum it, or where it is long, 4 to 16 warps'."""
    block = next_power_of_2(matrix.size(1))
    if block <= A_WARP:
        return _tile("forward", matrix, rms, A_WARP, 1)
    return _tile("forward", matrix, rms, block, min(max(block // A_WARP_LONG, 4), 16))


def _backward_tile(matrix, rms):
    """Eight elements a thread, more in the longest rows."""
    # layer_norm's of 4096 columns spills with 16 warps in float32, with 8 in narrow dtypes
    most = 16 if rms or matrix.dtype is not torch.float32 else 8
    warps = min(max(next_power_of_2(matrix.size(1)) // BACKWARD, 8), most)
    return _tile("backward", matrix, rms, warps * BACKWARD, warps)


def _casting_of(x, casting):
    return "gemma" if x.dtype is torch.float32 else casting  # which rounds nothing else


def layer_norm(x, residual, weight, bias, rms, eps, casting):
    require_alike(x, residual)
    matrix, stride = as_matrix(x)
    weight, bias = require_channels(matrix, weight, bias)
    y, h = dense_like(x), x.new_empty(0) if residual is None else dense_like(x)
    mean, rstd = (x.new_empty(shape, dtype=torch.float32) for shape in (0 if rms else x.shape[:-1], x.shape[:-1]))
    rows, columns = matrix.shape
    casting = _casting_of(x, casting)
    if rows:
        added, added_stride = (None, 0) if residual is None else as_matrix(residual)
        pointers = (matrix, added, weight, bias, y, None if residual is None else h, None if rms else mean, rstd)
        sizes = (columns, stride, added_stride, eps)
        if columns <= LONGEST:
            tile = _forward_tile(matrix, rms)
            all_tiles = ceil_div(rows, tile["ROWS"])
            tiles = ceil_div(all_tiles * tile["num_warps"], WARPS)
            grid = (ceil_div(all_tiles, tiles),)
            _layer_norm_forward[grid](*pointers, rows, *sizes, tiles, CASTING=casting, **tile)
        else:
            _layer_norm_forward_long[(rows,)](*pointers, *sizes, CASTING=casting, BLOCK=BLOCK, num_warps=LONG_WARPS)
    return y, h, mean, rstd


def layer_norm_backward(grad_y, grad_h, h, weight, mean, rstd, with_weight, with_bias, rms, casting):
    require_alike(h, grad_y, grad_h)
    require_rows(h, None if rms else mean, rstd)
    matrix, stride = as_matrix(h)
    (weight,) = require_channels(matrix, weight)
    rows, columns = matrix.shape
    grad_x, wanted = dense_like(h), (with_weight, with_bias)
    if not rows:
        return grad_x, *(h.new_zeros(columns if w else 0, dtype=torch.float32) for w in wanted)
    dy, dy_stride = as_matrix(grad_y)
    dh, dh_stride = (None, 0) if grad_h is None else as_matrix(grad_h)
    mean, rstd, casting = None if rms else mean.contiguous(), rstd.contiguous(), _casting_of(h, casting)
    pointers, strides = (dy, dh, matrix, weight, mean, rstd, grad_x), (dy_stride, dh_stride, stride)
    short = columns <= (LONGEST if rms else LONGEST // 2)
    long_tile = dict(ROWS=SUM_ROWS, BLOCK=SUM_COLUMNS, num_warps=NUM_WARPS)
    tile = _backward_tile(matrix, rms) if short else long_tile
    all_tiles = ceil_div(rows, tile["ROWS"])
    tiles = ceil_div(all_tiles, PROGRAMS if short else SUM_PROGRAMS)
    programs = ceil_div(all_tiles, tiles)
    sums = [h.new_empty((programs, columns), dtype=torch.float32) if w else None for w in wanted]
    if short:
        _layer_norm_backward[(programs,)](*pointers, *sums, rows, columns, *strides, tiles, CASTING=casting, **tile)
    else:
        _layer_norm_backward_long[(rows,)](*pointers, columns, *strides, BLOCK=BLOCK, num_warps=LONG_WARPS)
        if any(wanted):
            _layer_norm_sums_long[(programs * ceil_div(columns, SUM_COLUMNS),)](
                dy, matrix, mean, rstd, *sums, rows, columns, dy_stride, stride, tiles, CASTING=casting, **tile
            )
    totals = [h.new_empty(columns if w else 0, dtype=torch.float32) for w in wanted]
    if any(wanted):
        _layer_norm_add[(ceil_div(columns, ADD_COLUMNS) * sum(wanted),)](
            *sums, *(t if w else None for t, w in zip(totals, wanted, strict=True)), programs, columns,
            ROWS=ADD_ROWS, BLOCK=ADD_COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_x, *totals
