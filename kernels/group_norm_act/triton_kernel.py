"""group_norm_act on the GPU: a program has one group of one sample, in registers if it fits; no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common.activations_triton import activate, times_derivative, times_derivative_from_output
from genai_fast.kernels.common.channels import like_partner
from genai_fast.kernels.common.launch import ceil_div, next_power_of_2
from genai_fast.kernels.common.tuned import launch
from genai_fast.kernels.group_norm_act.layout import prepared, require_statistics, sizes

FORWARD, BACKWARD = 8192, 4096  # elements of a tile: backward holds more of each
FORWARD_WARPS, BACKWARD_WARPS = 8, 8
MOST_CHANNELS = 64  # of a tile
LANES = 32
SECTOR, SHORT = 32, 512  # bytes that memory gives at once; elements that make a program worth it


@triton.jit
def _tile(first_channel, first, each, positions, channel_stride, position_stride,
          CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Offsets from a program's first element and mask [CHANNELS, POSITIONS], and the channels from its first on."""
    channel = first_channel + tl.arange(0, CHANNELS)
    position = first + tl.arange(0, POSITIONS)
    # Where all are known to be there, a thread loads several channels at once.
    inside = tl.full([CHANNELS], 1, tl.int1) if WHOLE else channel < each
    mask = inside[:, None] & (position < positions)[None, :]
    return channel[:, None] * channel_stride + position[None, :] * position_stride, mask, channel


@triton.jit
def _place(channels, positions, groups, channel_stride, EACH: tl.constexpr, CHANNELS: tl.constexpr):
    """Of this program: its first element, its first place in [samples, channels], first channel and number of them, its
    groups and which of these there are, and a group's size.

    Where a channel is a group (EACH is 1), a program has several.
    """
    ALONE: tl.constexpr = EACH == 1
    blocks = tl.cdiv(channels, CHANNELS) if ALONE else groups
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * (CHANNELS if ALONE else EACH)
    each = tl.minimum(channels - first, CHANNELS) if ALONE else EACH
    own = tl.arange(0, CHANNELS if ALONE else 1)
    group = sample * groups + (first if ALONE else tl.program_id(0) % blocks) + own
    base = sample * channels * positions + first.to(tl.int64) * channel_stride
    return base, sample * channels + first, first, each, group, own < (each if ALONE else 1), 1.0 * EACH * positions


@triton.jit
def _of_groups(values, ALONE: tl.constexpr):
    """Sums [CHANNELS, POSITIONS] -> [CHANNELS] where channels are groups, else [1]."""
    if not ALONE:
        values = tl.reshape(values, [1, values.shape[0] * values.shape[1]])
    return tl.sum(values, axis=1)


@triton.jit
def _of_channels(values, inside, ALONE: tl.constexpr):
    """Sums [CHANNELS] -> themselves where channels are groups, else [1]."""
    # The choice keeps products out of the sum's fused multiply-adds, in which lanes round unlike each other.
    return values if ALONE else tl.sum(tl.where(inside, values, 0.0), axis=0, keep_dims=True)


@triton.jit
def _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, first, row, channel, inside):
    """factor and addend of z = x-hat factor + addend, by channel; row: of [samples, channels]."""
    factor = tl.where(inside, 1.0, 0.0)
    addend = tl.zeros_like(factor)
    if weight_ptr is not None:
        factor = tl.load(weight_ptr + first + channel, mask=inside, other=0.0)
    if bias_ptr is not None:
        addend = tl.load(bias_ptr + first + channel, mask=inside, other=0.0)
    if scale_ptr is not None:
        modulation = 1.0 + tl.load(scale_ptr + row + channel, mask=inside, other=0.0)
        factor *= modulation
        addend *= modulation
    if shift_ptr is not None:
        addend += tl.load(shift_ptr + row + channel, mask=inside, other=0.0)
    return factor, addend


@triton.jit
def _output(
    d, rstd, factor, addend, residual_ptr, offs, mask, slope, ACTIVATION: tl.constexpr, AFTER: tl.constexpr
):  # fmt: skip
    """activate(d rstd factor + addend + residual) of one tile, the residual outside if AFTER."""
    z = d * (rstd * factor)[:, None] + addend[:, None]
    if residual_ptr is not None and not AFTER:
        z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = activate(z, slope, ACTIVATION)
    if residual_ptr is not None and AFTER:
        y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _group_norm_act_forward(
    x_ptr, residual_ptr, y_ptr,              # [samples, channels, positions], the second may be None
    weight_ptr, bias_ptr,                    # [channels] or None
    scale_ptr, shift_ptr,                    # [samples, channels] or None
    mean_ptr, rstd_ptr,                      # [samples, groups]
    channels, positions, groups, channel_stride, position_stride, eps, slope,
    ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, EACH: tl.constexpr, ONE: tl.constexpr,
    WHOLE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """Statistics and y of one group; ONE: it is a single tile, read once, else three times."""
    ALONE: tl.constexpr = EACH == 1
    base, row, first, each, group, present, count = _place(channels, positions, groups, channel_stride, EACH, CHANNELS)
    x_ptr += base
    y_ptr += base
    if residual_ptr is not None:
        residual_ptr += base
    if ONE:
        offs, mask, channel = _tile(0, 0, each, positions, channel_stride, position_stride, CHANNELS, POSITIONS, WHOLE)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = _of_groups(x, ALONE) / count
        d = tl.where(mask, x - mean[:, None], 0.0)
        rest = _of_groups(d, ALONE) / count  # lost to rounding, where the mean is far from 0
        d = tl.where(mask, d - rest[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(_of_groups(tl.where(mask, d * d, 0.0), ALONE) / count + eps)
        factor, addend = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, first, row, channel, channel < each)
        y = _output(d, rstd, factor, addend, residual_ptr, offs, mask, slope, ACTIVATION, AFTER)
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        total = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        for c in range(0, CHANNELS if ALONE else EACH, CHANNELS):
            for p in range(0, positions, POSITIONS):
                offs, mask, channel = _tile(
                    c, p, each, positions, channel_stride, position_stride, CHANNELS, POSITIONS, WHOLE
                )
                total += tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = _of_groups(total, ALONE) / count
        lost = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        square = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        for c in range(0, CHANNELS if ALONE else EACH, CHANNELS):
            for p in range(0, positions, POSITIONS):
                offs, mask, channel = _tile(
                    c, p, each, positions, channel_stride, position_stride, CHANNELS, POSITIONS, WHOLE
                )
                x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
                d = tl.where(mask, x - mean[:, None], 0.0)
                lost += d
                square += d * d
        rest = _of_groups(lost, ALONE) / count
        variance = _of_groups(square, ALONE) / count - rest * rest
        rstd = 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)  # rounding; NaN stays
        for c in range(0, CHANNELS if ALONE else EACH, CHANNELS):
            channel = c + tl.arange(0, CHANNELS)
            factor, addend = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, first, row, channel, channel < each)
            for p in range(0, positions, POSITIONS):
                offs, mask, _ = _tile(
                    c, p, each, positions, channel_stride, position_stride, CHANNELS, POSITIONS, WHOLE
                )
                x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
                d = x - mean[:, None] - rest[:, None]
                y = _output(d, rstd, factor, addend, residual_ptr, offs, mask, slope, ACTIVATION, AFTER)
                tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + group, mean + rest, mask=present)
    tl.store(rstd_ptr + group, rstd, mask=present)


@triton.jit
def _loaded(
    x_ptr, grad_y_ptr, beside_ptr, offs, mask, mean, rstd, factor, addend, slope, ACTIVATION: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
):  # fmt: skip
    """x-hat and dz of one tile."""
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    d = tl.where(mask, x - mean[:, None], 0.0)
    z = d * (rstd * factor)[:, None] + addend[:, None]
    if beside_ptr is not None:
        beside = tl.load(beside_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        z = beside if FROM_OUTPUT else z + beside
    grad = tl.load(grad_y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if FROM_OUTPUT:
        dz = times_derivative_from_output(grad, z, slope, ACTIVATION)
    else:
        dz = times_derivative(grad, z, slope, ACTIVATION)
    return d * rstd[:, None], tl.where(mask, dz, 0.0)


@triton.jit
def _group_norm_act_backward(
    grad_y_ptr, x_ptr, beside_ptr,           # [samples, channels, positions], the third is the residual, y or None
    grad_x_ptr, dz_ptr,                      # the same; dz is None without a residual
    weight_ptr, bias_ptr,                    # [channels] or None
    scale_ptr, shift_ptr,                    # [samples, channels] or None
    mean_ptr, rstd_ptr,                      # [samples, groups]
    sum_dz_ptr, sum_dz_x_hat_ptr,            # [samples, channels]
    channels, positions, groups, channel_stride, position_stride, slope,
    ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, EACH: tl.constexpr, ONE: tl.constexpr,
    WHOLE: tl.constexpr, FROM_OUTPUT: tl.constexpr,
):  # fmt: skip
    """Sums by channel, dx and dz of one group; ONE: it is a single tile, read once, else twice."""
    ALONE: tl.constexpr = EACH == 1
    base, row, first, each, group, present, count = _place(channels, positions, groups, channel_stride, EACH, CHANNELS)
    x_ptr += base
    grad_y_ptr += base
    grad_x_ptr += base
    if beside_ptr is not None:
        beside_ptr += base
        dz_ptr += base
    mean = tl.load(mean_ptr + group, mask=present, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=present, other=0.0)
    sum_dz_ptr += row
    sum_dz_x_hat_ptr += row
    if ONE:
        offs, mask, channel = _tile(0, 0, each, positions, channel_stride, position_stride, CHANNELS, POSITIONS, WHOLE)
        inside = channel < each
        factor, addend = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, first, row, channel, inside)
        x_hat, dz = _loaded(
            x_ptr, grad_y_ptr, beside_ptr, offs, mask, mean, rstd, factor, addend, slope, ACTIVATION, FROM_OUTPUT
        )
        sum_dz = tl.sum(dz, axis=1)
        sum_dz_x_hat = tl.sum(tl.where(mask, dz * x_hat, 0.0), axis=1)  # as in _of_channels
        tl.store(sum_dz_ptr + channel, sum_dz, mask=inside)
        tl.store(sum_dz_x_hat_ptr + channel, sum_dz_x_hat, mask=inside)
        constant = _of_channels(factor * sum_dz, inside, ALONE) / count
        linear = _of_channels(factor * sum_dz_x_hat, inside, ALONE) / count
        dx = rstd[:, None] * (dz * factor[:, None] - constant[:, None] - x_hat * linear[:, None])
        tl.store(grad_x_ptr + offs, dx.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if dz_ptr is not None:
            tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    else:
        constant = tl.zeros([CHANNELS if ALONE else 1], tl.float32)
        linear = tl.zeros([CHANNELS if ALONE else 1], tl.float32)
        for c in range(0, CHANNELS if ALONE else EACH, CHANNELS):
            channel = c + tl.arange(0, CHANNELS)
            inside = channel < each
            factor, addend = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, first, row, channel, inside)
            total = tl.zeros([CHANNELS, POSITIONS], tl.float32)
            product = tl.zeros([CHANNELS, POSITIONS], tl.float32)
            for p in range(0, positions, POSITIONS):
                offs, mask, _ = _tile(
                    c, p, each, positions, channel_stride, position_stride, CHANNELS, POSITIONS, WHOLE
                )
                x_hat, dz = _loaded(
                    x_ptr,
                    grad_y_ptr,
                    beside_ptr,
                    offs,
                    mask,
                    mean,
                    rstd,
                    factor,
                    addend,
                    slope,
                    ACTIVATION,
                    FROM_OUTPUT,
                )
                total += dz
                product += dz * x_hat
            sum_dz = tl.sum(total, axis=1)
            sum_dz_x_hat = tl.sum(product, axis=1)
            tl.store(sum_dz_ptr + channel, sum_dz, mask=inside)
            tl.store(sum_dz_x_hat_ptr + channel, sum_dz_x_hat, mask=inside)
            constant += _of_channels(factor * sum_dz, inside, ALONE)
            linear += _of_channels(factor * sum_dz_x_hat, inside, ALONE)
        constant /= count
        linear /= count
        for c in range(0, CHANNELS if ALONE else EACH, CHANNELS):
            channel = c + tl.arange(0, CHANNELS)
            factor, addend = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, first, row, channel, channel < each)
            for p in range(0, positions, POSITIONS):
                offs, mask, _ = _tile(
                    c, p, each, positions, channel_stride, position_stride, CHANNELS, POSITIONS, WHOLE
                )
                x_hat, dz = _loaded(
                    x_ptr,
                    grad_y_ptr,
                    beside_ptr,
                    offs,
                    mask,
                    mean,
                    rstd,
                    factor,
                    addend,
                    slope,
                    ACTIVATION,
                    FROM_OUTPUT,
                )
                dx = rstd[:, None] * (dz * factor[:, None] - constant[:, None] - x_hat * linear[:, None])
                tl.store(grad_x_ptr + offs, dx.to(grad_x_ptr.dtype.element_ty), mask=mask)
                if dz_ptr is not None:
                    tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def _launch(name, x, groups, elements, num_warps):
    """(grid, sizes, constants): tiles of a group's channels by positions, or of several channels that are groups."""
    samples, channels, positions, last = sizes(x)
    each, alone = channels // groups, channels == groups
    chosen = launch(f"group_norm_act/{name}", x, (each, positions), elements=elements, num_warps=num_warps)
    together = SECTOR // x.element_size() if last else max(SHORT // positions, 1)  # of channels that are groups
    tile_channels = min(next_power_of_2(min(together, channels) if alone else each), MOST_CHANNELS)
    # A tile of fewer elements than lanes would be held, and summed, more than once.
    tile_positions = max(next_power_of_2(positions), ceil_div(LANES, tile_channels))
    tile_positions = min(tile_positions, max(chosen["elements"] // tile_channels, 1))
    constants = dict(
        CHANNELS=tile_channels,
        POSITIONS=tile_positions,
        ONE=(alone or tile_channels >= each) and tile_positions >= positions,
        EACH=each,
        WHOLE=(channels if alone else each) % tile_channels == 0,
        num_warps=min(chosen["num_warps"], max(tile_channels * tile_positions // (8 * LANES), 1)),
    )
    grid = samples * (ceil_div(channels, tile_channels) if alone else groups)
    return (grid,), (channels, positions, groups, *((1, channels) if last else (positions, 1))), constants


def group_norm_act_forward(x, groups, weight, bias, scale, shift, residual, after, eps, activation, slope):
    x, parameters = prepared(x, groups, weight, bias, scale, shift)
    residual = like_partner(residual, x)
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty((x.size(0), groups), dtype=torch.float32) for _ in range(2))
    if x.numel():
        grid, shape, constants = _launch("forward", x, groups, FORWARD, FORWARD_WARPS)
        _group_norm_act_forward[grid](
            x, residual, y, *parameters, mean, rstd, *shape, eps, slope, ACTIVATION=activation, AFTER=after, **constants
        )
    return y, mean, rstd


def group_norm_act_backward(
    grad_y, x, groups, weight, bias, scale, shift, beside, from_output, mean, rstd, activation, slope
):  # fmt: skip
    x, parameters = prepared(x, groups, weight, bias, scale, shift)
    grad_y, beside = like_partner(grad_y, x), like_partner(beside, x)
    statistics = require_statistics(x, groups, mean, rstd)
    grad_x = torch.empty_like(x)
    dz = None if beside is None else torch.empty_like(x)
    sums = tuple(x.new_zeros(x.shape[:2], dtype=torch.float32) for _ in range(2))
    if x.numel():
        grid, shape, constants = _launch("backward", x, groups, BACKWARD, BACKWARD_WARPS)
        _group_norm_act_backward[grid](
            grad_y, x, beside, grad_x, dz, *parameters, *statistics, *sums, *shape, slope, ACTIVATION=activation,
            FROM_OUTPUT=from_output, **constants,
        )  # fmt: skip
    return grad_x, x.new_empty(0) if dz is None else dz, *sums
