"""batch_norm_act on the GPU: sums by program over a range of tiles, then added in a fixed order; no atomics."""

from __future__ import annotations

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
from genai_fast.kernels.common.channels import dense_channels, extent, like_partner, require_channels
from genai_fast.kernels.common.launch import ceil_div, row_tile
from genai_fast.kernels.common.moments_triton import combine_grid, combine_moments
from genai_fast.kernels.common.tuned import launch

ELEMENTS = 1024  # a tile of the elementwise kernels: 8 elements a thread
NUM_WARPS = 4
SUM_ELEMENTS, SUM_WARPS = 2048, 8  # a tile of the sums
CHANNELS_A_PROGRAM = 64  # of the sums, where channels lie last
MOST_GROUPS = 256  # partial sums a channel
# Bytes of neighbouring channels that two threads of a warp load; the other threads load other rows. Had a warp all
# channels of a few rows, the warps' sums would meet in shared memory at addresses of one bank.
SECTOR = 32


@triton.jit
def _elements(tile, base, outer, limit, row_stride, across, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask [ROWS, BLOCK] of a tile: rows row_stride apart, `across` tiles in `limit` columns."""
    row = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # outer * row_stride passes 2**31
    column = (tile % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < outer)[:, None] & (column < limit)[None, :]
    return row[:, None] * row_stride + base + column[None, :], mask


@triton.jit
def _summed(tile, base, outer, limit, row_stride, across, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets and mask [PARTS * ROWS, WIDTH] of a tile of the sums, whose columns are PARTS times WIDTH."""
    # In two dimensions, since versions of Triton differ in which of three the threads of a warp fill first.
    both = tl.arange(0, PARTS * ROWS)
    row = (tile // across).to(tl.int64) * ROWS + both % ROWS
    column = (tile % across).to(tl.int64) * (PARTS * WIDTH) + (both // ROWS * WIDTH)[:, None] + tl.arange(0, WIDTH)
    return row[:, None] * row_stride + base + column, (row < outer)[:, None] & (column < limit)


@triton.jit
def _loaded(x_ptr, offs, mask, PARTS: tl.constexpr):
    """[PARTS, ROWS, WIDTH] in float32."""
    return _apart(tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32), PARTS)


@triton.jit
def _apart(x, PARTS: tl.constexpr):
    return tl.reshape(x, [PARTS, x.shape[0] // PARTS, x.shape[1]])


@triton.jit
def _columns(PARTS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.arange(0, PARTS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _range(
    outer, channels, inner, tiles, LAST: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """What a summing program covers: group, channels, base, columns, tiles across, first tile and one past the last."""
    program = tl.program_id(0)
    BLOCK: tl.constexpr = PARTS * WIDTH
    if LAST:  # a block of channels; rows hold all channels
        blocks = tl.cdiv(channels, BLOCK)
        first = program % blocks * BLOCK
        channel = first + _columns(PARTS, WIDTH)
        base = first.to(tl.int64)
        limit = channels - first
        across = 1
    else:  # one channel; rows are its planes
        blocks = channels
        channel = program % blocks + tl.zeros([1, 1], tl.int32)
        base = (program % blocks).to(tl.int64) * inner
        limit = inner
        across = tl.cdiv(inner, BLOCK)
    group = program // blocks
    end = tl.minimum((group + 1) * tiles, tl.cdiv(outer, ROWS) * across)
    return group, channel, base, limit, across, group * tiles, end


@triton.jit
def _by_channel(x, LAST: tl.constexpr):
    """[PARTS, ROWS, WIDTH] -> [PARTS, WIDTH] where channels lie last, else [1, 1]."""
    # To one number at once: sums of columns would go from warp to warp through shared memory first.
    return tl.sum(x, axis=1) if LAST else tl.sum(tl.reshape(x, [1, 1, x.shape[1] * x.shape[2]]), axis=2)


@triton.jit
def _rows(begin, end, outer, ROWS: tl.constexpr):
    """Rows in the tiles from begin to end, if each tile is of whole rows."""
    return (tl.minimum(end.to(tl.int64) * ROWS, outer) - begin.to(tl.int64) * ROWS).to(tl.float32)


@triton.jit
def _batch_norm_moments(
    x_ptr,                                   # [outer, channels, inner]
    partial_ptr,                             # [3, groups, channels]: count, mean, squared deviations
    outer, channels, inner, row_stride, plane, tiles,
    LAST: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations over this program's tiles, from sums around the first tile's mean."""
    group, channel, base, limit, across, begin, end = _range(outer, channels, inner, tiles, LAST, PARTS, ROWS, WIDTH)
    offs, mask = _summed(begin, base, outer, limit, row_stride, across, PARTS, ROWS, WIDTH)
    x, mask = _loaded(x_ptr, offs, mask, PARTS), _apart(mask, PARTS)
    if LAST:  # known without a sum
        rows, n = _rows(begin, begin + 1, outer, ROWS), _rows(begin, end, outer, ROWS)
    else:
        rows, n = _by_channel(mask.to(tl.float32), LAST), 0.0
    shift = _by_channel(x, LAST) / tl.maximum(rows, 1.0)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    count = tl.zeros([PARTS, ROWS, WIDTH], tl.float32)
    total = tl.zeros([PARTS, ROWS, WIDTH], tl.float32)
    square = tl.zeros([PARTS, ROWS, WIDTH], tl.float32)
    for tile in range(begin, end):
        offs, mask = _summed(tile, base, outer, limit, row_stride, across, PARTS, ROWS, WIDTH)
        x, mask = _loaded(x_ptr, offs, mask, PARTS), _apart(mask, PARTS)
        d = tl.where(mask, x - shift[:, None, :], 0.0)
        if not LAST:
            count += mask.to(tl.float32)
        total += d
        square += d * d
    if not LAST:
        n = _by_channel(count, LAST)
    n = tl.maximum(n, 1.0)
    total_d = _by_channel(total, LAST)
    deviations = _by_channel(square, LAST) - total_d * (total_d / n)
    deviations = tl.where(deviations < 0.0, 0.0, deviations)  # rounding; NaN stays
    at = partial_ptr + group.to(tl.int64) * channels + channel
    inside = channel < channels
    tl.store(at, n + tl.zeros_like(total_d), mask=inside)
    tl.store(at + plane, shift + total_d / n, mask=inside)
    tl.store(at + 2 * plane, deviations, mask=inside)


@triton.jit
def _coefficients(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, channel, inside):
    """mean, scale and shift of z = (x - mean) scale + shift for these channels."""
    mean = tl.load(mean_ptr + channel, mask=inside, other=0.0)
    scale = tl.load(rstd_ptr + channel, mask=inside, other=0.0)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel, mask=inside, other=0.0)
    shift = tl.zeros_like(scale)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + channel, mask=inside, other=0.0)
    return mean, scale, shift


@triton.jit
def _matrix_tile(rows, columns, channels, across, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets, mask and channels of an elementwise program's tile of [rows, columns]."""
    offs, mask = _elements(tl.program_id(0), 0, rows, columns, columns, across, ROWS, BLOCK)
    if LAST:
        channel = (tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK))[None, :]
    else:
        row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        channel = (row % channels)[:, None]
    return offs, mask, channel


@triton.jit
def _batch_norm_act_apply(
    x_ptr, residual_ptr, y_ptr,              # [rows, columns], the second may be None
    weight_ptr, bias_ptr, slopes_ptr, mean_ptr, rstd_ptr,  # [channels], the first three may be None
    rows, columns, channels, across, slope,
    LAST: tl.constexpr, ACTIVATION: tl.constexpr, AFTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = activate((x - mean) rstd weight + bias + residual), the residual outside if AFTER."""
    offs, mask, channel = _matrix_tile(rows, columns, channels, across, LAST, ROWS, BLOCK)
    mean, scale, shift = _coefficients(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, channel, channel < channels)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    z = (x - mean) * scale + shift
    if residual_ptr is not None and not AFTER:
        z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + channel, mask=channel < channels, other=0.0)
    y = activate(z, slope, ACTIVATION)
    if residual_ptr is not None and AFTER:
        y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _batch_norm_act_sums(
    grad_y_ptr, x_ptr,                       # [outer, channels, inner]
    beside_ptr, dz_ptr,                      # the same: the residual, or y if FROM_OUTPUT, and dz; or both None
    weight_ptr, bias_ptr, slopes_ptr, mean_ptr, rstd_ptr,  # [channels], the first three may be None
    partial_ptr,                             # [2, groups, channels], with slopes [3, groups, channels]
    outer, channels, inner, row_stride, plane, tiles, slope,
    LAST: tl.constexpr, ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums of dz, of dz (x - mean) and of the slopes' gradient over this program's tiles, dz = dy activate'(z)."""
    group, channel, base, limit, across, begin, end = _range(outer, channels, inner, tiles, LAST, PARTS, ROWS, WIDTH)
    inside = channel < channels
    mean, scale, shift = _coefficients(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, channel, inside)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + channel, mask=inside, other=0.0)[:, None, :]
        by_slope = tl.zeros([PARTS, ROWS, WIDTH], tl.float32)
    total = tl.zeros([PARTS, ROWS, WIDTH], tl.float32)
    product = tl.zeros([PARTS, ROWS, WIDTH], tl.float32)
    for tile in range(begin, end):
        offs, mask = _summed(tile, base, outer, limit, row_stride, across, PARTS, ROWS, WIDTH)
        x, grad = _loaded(x_ptr, offs, mask, PARTS), _loaded(grad_y_ptr, offs, mask, PARTS)
        d = x - mean[:, None, :]
        z = d * scale[:, None, :] + shift[:, None, :]
        if beside_ptr is not None:
            beside = _loaded(beside_ptr, offs, mask, PARTS)
            z = beside if FROM_OUTPUT else z + beside
        if FROM_OUTPUT:
            dz = times_derivative_from_output(grad, z, slope, ACTIVATION)
        else:
            dz = times_derivative(grad, z, slope, ACTIVATION)
        if dz_ptr is not None:
            together = tl.reshape(dz, [PARTS * ROWS, WIDTH])
            tl.store(dz_ptr + offs, together.to(dz_ptr.dtype.element_ty), mask=mask)
        mask = _apart(mask, PARTS)
        dz = tl.where(mask, dz, 0.0)
        if slopes_ptr is not None:
            by_slope += tl.where(mask, times_derivative_by_slope(grad, z), 0.0)
        total += dz
        product += tl.where(mask, dz * d, 0.0)
    at = partial_ptr + group.to(tl.int64) * channels + channel
    tl.store(at, _by_channel(total, LAST), mask=inside)
    tl.store(at + plane, _by_channel(product, LAST), mask=inside)
    if slopes_ptr is not None:
        tl.store(at + 2 * plane, _by_channel(by_slope, LAST), mask=inside)


@triton.jit
def _batch_norm_combine_sums(
    partial_ptr, rstd_ptr,                   # [2 or 3, groups, channels], [channels]
    sum_dz_ptr, sum_dz_x_hat_ptr,            # [channels]
    groups, channels, plane,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([GROUPS, CHANNELS], tl.float32)
    product = tl.zeros([GROUPS, CHANNELS], tl.float32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        mask = (group < groups)[:, None] & (channel < channels)[None, :]
        at = partial_ptr + group[:, None].to(tl.int64) * channels + channel[None, :]
        total += tl.load(at, mask=mask, other=0.0)
        product += tl.load(at + plane, mask=mask, other=0.0)
    inside = channel < channels
    rstd = tl.load(rstd_ptr + channel, mask=inside, other=0.0)
    tl.store(sum_dz_ptr + channel, tl.sum(total, axis=0), mask=inside)
    tl.store(sum_dz_x_hat_ptr + channel, tl.sum(product, axis=0) * rstd, mask=inside)


@triton.jit
def _batch_norm_act_grad(
    grad_y_ptr, x_ptr, grad_x_ptr,           # [rows, columns]
    weight_ptr, bias_ptr, slopes_ptr, mean_ptr, rstd_ptr,  # [channels], the first three may be None
    sum_dz_ptr, sum_dz_x_hat_ptr,            # [channels] or None
    rows, columns, channels, across, share, slope,
    LAST: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = weight rstd (dz - share sum_dz - x-hat share sum_dz_x_hat)."""
    offs, mask, channel = _matrix_tile(rows, columns, channels, across, LAST, ROWS, BLOCK)
    inside = channel < channels
    mean, scale, shift = _coefficients(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, channel, inside)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    d = x - mean
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + channel, mask=inside, other=0.0)
    dx = scale * times_derivative(grad, d * scale + shift, slope, ACTIVATION)
    if sum_dz_ptr is not None:
        rstd = tl.load(rstd_ptr + channel, mask=inside, other=0.0)
        linear = scale * rstd * (share * tl.load(sum_dz_x_hat_ptr + channel, mask=inside, other=0.0))
        constant = scale * (share * tl.load(sum_dz_ptr + channel, mask=inside, other=0.0))
        dx -= linear * d + constant
    tl.store(grad_x_ptr + offs, dx.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _matrix(name, x):
    """(grid, rows, columns, channels, across) of the elementwise kernels and their constants."""
    outer, channels, inner = extent(x)
    rows, columns = (outer, channels) if inner == 1 else (outer * channels, inner)
    chosen = launch(f"batch_norm_act/{name}", x, (rows, columns), elements=ELEMENTS, num_warps=NUM_WARPS)
    tile_rows, block, across = row_tile(columns, chosen["elements"])
    constants = dict(LAST=inner == 1, ROWS=tile_rows, BLOCK=block, num_warps=chosen["num_warps"])
    return (ceil_div(rows, tile_rows) * across,), (rows, columns, channels, across), constants


def _sums(name, x):
    """grid, groups, sizes and constants of the summing kernels: their partial sums are [..., groups, channels]."""
    outer, channels, inner = extent(x)
    last = inner == 1
    chosen = launch(
        f"batch_norm_act/{name}", x, (outer, channels, inner),
        elements=SUM_ELEMENTS, channels=CHANNELS_A_PROGRAM, groups=MOST_GROUPS, num_warps=SUM_WARPS,
    )  # fmt: skip
    columns = min(channels, chosen["channels"]) if last else inner
    rows, block, across = row_tile(columns, chosen["elements"])
    all_tiles = ceil_div(outer, rows) * (1 if last else across)
    tiles = max(ceil_div(all_tiles, chosen["groups"]), 1)
    groups = max(ceil_div(all_tiles, tiles), 1)
    blocks = ceil_div(channels, block) if last else channels
    width = min(block, SECTOR // x.element_size()) if last else block
    constants = dict(LAST=last, PARTS=block // width, ROWS=rows, WIDTH=width, num_warps=chosen["num_warps"])
    return (blocks * groups,), groups, (outer, channels, inner, channels * inner, groups * channels, tiles), constants


def batch_norm_statistics(x, running_mean, running_var, momentum, eps):
    x = dense_channels(x)
    require_channels(x, running_mean, running_var, dtype=None)
    grid, groups, sizes, constants = _sums("moments", x)
    outer, channels, inner = sizes[:3]
    partial = x.new_empty((3, groups, channels), dtype=torch.float32)
    _batch_norm_moments[grid](x, partial, *sizes, **constants)
    return combine_moments(partial, running_mean, running_var, outer * inner, momentum, eps)


def batch_norm_act_apply(x, weight, bias, slopes, mean, rstd, residual, after, activation, slope):
    code_beside(slopes, activation)
    x = dense_channels(x)
    residual = like_partner(residual, x)
    parameters = require_channels(x, weight, bias, slopes, mean, rstd)
    y = torch.empty_like(x)
    if x.numel():
        grid, sizes, constants = _matrix("apply", x)
        _batch_norm_act_apply[grid](
            x, residual, y, *parameters, *sizes, slope, ACTIVATION=activation, AFTER=after, **constants
        )
    return y


def batch_norm_act_reduce(grad_y, x, weight, bias, slopes, mean, rstd, beside, from_output, activation, slope):
    code_beside(slopes, activation)
    x = dense_channels(x)
    grad_y, beside = like_partner(grad_y, x), like_partner(beside, x)
    parameters = require_channels(x, weight, bias, slopes, mean, rstd)
    grid, groups, sizes, constants = _sums("sums", x)
    channels = x.size(1)
    partial = x.new_empty((2 if slopes is None else 3, groups, channels), dtype=torch.float32)
    results = tuple(x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    dz = None if beside is None else torch.empty_like(x)
    narrow = x.new_empty(0) if dz is None else dz
    if not x.numel():
        return *(r.zero_() for r in results), narrow, x.new_zeros(0 if slopes is None else channels).float()
    _batch_norm_act_sums[grid](
        grad_y, x, beside, dz, *parameters, partial, *sizes, slope, ACTIVATION=activation, FROM_OUTPUT=from_output,
        **constants,
    )  # fmt: skip
    grid, constants = combine_grid(channels)
    _batch_norm_combine_sums[grid](partial, parameters[4], *results, groups, channels, groups * channels, **constants)
    grad_slopes = x.new_empty(0, dtype=torch.float32) if slopes is None else partial[2].sum(0)
    return *results, narrow, grad_slopes


def batch_norm_act_grad(grad_y, x, weight, bias, slopes, mean, rstd, sum_dz, sum_dz_x_hat, count, activation, slope):
    x = dense_channels(x)
    grad_y = like_partner(grad_y, x)
    parameters = require_channels(x, weight, bias, slopes, mean, rstd, sum_dz, sum_dz_x_hat)
    grad_x = torch.empty_like(x)
    if x.numel():
        grid, sizes, constants = _matrix("grad", x)
        _batch_norm_act_grad[grid](
            grad_y, x, grad_x, *parameters, *sizes, 1.0 / count, slope, ACTIVATION=activation, **constants
        )
    return grad_x
