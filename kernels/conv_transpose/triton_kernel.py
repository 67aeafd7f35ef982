"""conv_transpose on the GPU: implicit matrix products over the taps that meet each output pixel; no atomics.

All tensors are channels last. A pixel oy of the result meets the taps ky with (oy + padding - ky) divisible by the
stride: pixels with the same remainder, a phase, share their taps and are one ordinary convolution (Shi et al. 2016).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common.activations_triton import activate
from genai_fast.kernels.common.channels import require_channels
from genai_fast.kernels.common.dot_triton import dot
from genai_fast.kernels.common.extension import interpreting
from genai_fast.kernels.common.launch import ceil_div, compiled, next_power_of_2
from genai_fast.kernels.common.moments_triton import combine_moments
from genai_fast.kernels.common.recorder import reads
from genai_fast.kernels.common.tuned import launch
from genai_fast.kernels.conv_transpose.few_triton import _few_grad_input, _few_grad_weight, position
from genai_fast.kernels.conv_transpose.shapes import FEW_CHANNELS, channels_last, empty_channels_last, output_size

NUM_STAGES = 3
FEW_STAGES = 1  # copies in the background pass the L1 cache by, which holds what nine taps read of the same pixels
NUM_WARPS = 4  # eight are reported to miscompile loops over taps and channels (pytorch #173068)
PROGRAMS = 264  # two for each multiprocessor of an H100: fewer leave it idle
LEAST_STEPS = 8  # blocks of pixels a split adds up: fewer cost more in partial sums than they save
SUM_ELEMENTS = 1024


@triton.jit
def _accumulate(
    a_ptr, b_ptr,                  # [N, height, width, channels] read at the rows' pixels, weight
    rows, start, sample,           # [BLOCK_M]: which exist; the tile's first sample; [BLOCK_M]
    source_y, source_x,            # [BLOCK_M]: what tap 0 reads, perhaps outside the plane
    columns, weight_offs,          # [1, BLOCK_N]: which exist, and where channel 0 under kernel position (0, 0) lies
    weight_y, weight_x,            # kernel position of tap 0; if CHECKED of each column [1, BLOCK_N], perhaps outside
    height, width, channels, weight_channel, out_channels,
    taps_y, taps_x,
    STEP: tl.constexpr, WEIGHT_STEP_Y: tl.constexpr, WEIGHT_STEP_X: tl.constexpr,  # from a tap to the next
    KH: tl.constexpr, KW: tl.constexpr, CHECKED: tl.constexpr, EVEN: tl.constexpr,  # whole blocks of channels
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum over taps and channels of a[pixel, channel] weight[channel, tap, column], [BLOCK_M, BLOCK_N] in float32.

    One loop over both keeps the loads of the next tap in flight; its counters move without divisions. Each term of a
    mask costs one instruction for each load of 16 bytes, so there are as few as can be.
    """
    # Offsets of 32 bits from the tile's first sample on: the whole tensor may be larger than 2**31 elements.
    a_ptr += start.to(tl.int64) * height * width * channels
    row_offs = (((sample - start) * height + source_y) * width + source_x) * channels
    source_y = tl.where(rows, source_y, -(2**30))
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = tl.full((), 0, tl.int32)
    tap_y = tl.full((), 0, tl.int32)
    tap_x = tl.full((), 0, tl.int32)
    for _ in range(taps_y * taps_x * tl.cdiv(channels, BLOCK_K)):
        # As unsigned numbers what lies before the plane lies far behind it.
        y = (source_y + STEP * tap_y).to(tl.uint32, bitcast=True)
        x = (source_x + STEP * tap_x).to(tl.uint32, bitcast=True)
        k = first + offs_k
        ky = weight_y + WEIGHT_STEP_Y * tap_y
        kx = weight_x + WEIGHT_STEP_X * tap_x
        a_offs = row_offs[:, None] + (STEP * (tap_y * width + tap_x) * channels + k)[None, :]
        b_offs = k[:, None] * weight_channel + (weight_offs + (ky * KW + kx) * out_channels)
        a_mask = ((y < height) & (x < width))[:, None]
        b_mask = columns
        if CHECKED:
            b_mask &= (ky >= 0) & (ky < KH) & (kx >= 0) & (kx < KW)
        if not EVEN:
            a_mask &= (k < channels)[None, :]
            b_mask &= (k < channels)[:, None]
        a = tl.load(a_ptr + a_offs, mask=a_mask, other=0.0)
        b = tl.load(b_ptr + b_offs, mask=b_mask, other=0.0)
        acc = dot(a, b, acc, PRECISION, UPCAST)
        first += BLOCK_K
        last = first >= channels
        first = tl.where(last, 0, first)
        tap_x = tl.where(last, tap_x + 1, tap_x)
        line = tap_x >= taps_x
        tap_x = tl.where(line, 0, tap_x)
        tap_y = tl.where(line, tap_y + 1, tap_y)
    return acc


@triton.jit
def _conv_transpose_forward(
    x_ptr, weight_ptr, bias_ptr,             # [N, H, W, CI], [CI, KH, KW, CO], [CO] or None
    y_ptr, partial_ptr,                      # [N, OH, OW, CO], [3, groups, CO] or None
    batch, height, width, out_height, out_width, channels, out_channels, plane, slope,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    TOGETHER: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = activate(conv_transpose(x) + bias): a tile of BLOCK_M pixels of one phase and BLOCK_N channels a program.

    TOGETHER: all phases in one program, phase and channel together its columns: x is then read once, not once a phase.
    """
    blocks = 1 if TOGETHER else tl.cdiv(out_channels, BLOCK_N)
    phases: tl.constexpr = 1 if TOGETHER else SH * SW
    # Phases, then channels, then pixels: programs that run at the same time read the same x.
    phase = tl.program_id(0) % phases
    tile = tl.program_id(0) // phases // blocks
    column = (tl.program_id(0) // phases % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if TOGETHER:
        phase = column // out_channels
        channel = column % out_channels
        columns = phase < SH * SW
        rows_y = tl.cdiv(out_height, SH)
        rows_x = tl.cdiv(out_width, SW)
        reach_y: tl.constexpr = (SH - 1 + PH) // SH
        reach_x: tl.constexpr = (SW - 1 + PW) // SW
        taps_y: tl.constexpr = reach_y + (KH - 1 - PH + PH * SH) // SH - PH + 1
        taps_x: tl.constexpr = reach_x + (KW - 1 - PW + PW * SW) // SW - PW + 1
        phase_y = phase // SW
        phase_x = phase % SW
    else:
        channel = column
        columns = column < out_channels
        phase_y = phase // SW
        phase_x = phase % SW
        rows_y = (out_height - phase_y + SH - 1) // SH
        rows_x = (out_width - phase_x + SW - 1) // SW
        reach_y = (phase_y + PH) // SH
        reach_x = (phase_x + PW) // SW
        taps_y = (KH - (phase_y + PH) % SH + SH - 1) // SH
        taps_x = (KW - (phase_x + PW) % SW + SW - 1) // SW
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = row < batch * rows_y * rows_x
    sample, y, x = position(row, rows_y, rows_x)
    start = tile * BLOCK_M // tl.maximum(rows_y * rows_x, 1)
    out_pixel = ((sample - start) * out_height + y * SH) * out_width + x * SW  # under phase 0
    acc = _accumulate(
        x_ptr, weight_ptr, rows, start, sample, y + reach_y, x + reach_x, columns, channel,
        phase_y + PH - SH * reach_y, phase_x + PW - SW * reach_x,
        height, width, channels, KH * KW * out_channels, out_channels, taps_y, taps_x,
        -1, SH, SW, KH, KW, TOGETHER, EVEN, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=columns, other=0.0)
    z = activate(acc, slope, ACTIVATION).to(y_ptr.dtype.element_ty)
    mask = rows[:, None] & columns
    if TOGETHER:
        mask &= (y[:, None] * SH + phase_y < out_height) & (x[:, None] * SW + phase_x < out_width)
    y_ptr += start.to(tl.int64) * out_height * out_width * out_channels
    offs = (out_pixel[:, None] + (phase_y * out_width + phase_x)) * out_channels + channel
    tl.store(y_ptr + offs, z, mask=mask)
    if partial_ptr is not None:
        # Of y as it is stored: that is what is normalized.
        z = z.to(tl.float32)
        count = tl.sum(rows.to(tl.float32), axis=0)
        shift = tl.sum(tl.where(rows[:, None], z, 0.0), axis=0) / tl.maximum(count, 1.0)
        d = tl.where(rows[:, None], z - shift[None, :], 0.0)
        rest = tl.sum(d, axis=0) / tl.maximum(count, 1.0)  # what the sum of a large mean has rounded off
        mean = shift + rest
        squares = tl.sum(d * d, axis=0) - count * rest * rest
        squares = tl.where(squares < 0.0, 0.0, squares)  # rounding; NaN stays
        group = tile * phases + phase
        channel = (tl.program_id(0) // phases % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = channel < out_channels
        at = partial_ptr + group.to(tl.int64) * out_channels + channel
        tl.store(at, tl.zeros([BLOCK_N], tl.float32) + count, mask=inside)
        tl.store(at + plane, mean, mask=inside)
        tl.store(at + 2 * plane, squares, mask=inside)


@triton.jit
def _conv_transpose_grad_input(
    grad_y_ptr, weight_ptr, grad_x_ptr,      # [N, OH, OW, CO], [CI, KH, KW, CO], [N, H, W, CI]
    batch, height, width, out_height, out_width, channels, out_channels,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx = the ordinary convolution of dy: BLOCK_M pixels and BLOCK_N channels of dx a program."""
    blocks = tl.cdiv(channels, BLOCK_N)
    tile = tl.program_id(0) // blocks
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    columns = column < channels
    rows = row < batch * height * width
    sample, y, x = position(row, height, width)
    start = tile * BLOCK_M // tl.maximum(height * width, 1)
    tap = tl.full((), 0, tl.int32)
    acc = _accumulate(
        grad_y_ptr, weight_ptr, rows, start, sample, y * SH - PH, x * SW - PW, columns,
        column * (KH * KW * out_channels), tap, tap, out_height, out_width, out_channels, 1, out_channels, KH, KW,
        1, 1, 1, KH, KW, False, EVEN, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    at = grad_x_ptr + (row[:, None].to(tl.int64) * channels + column)
    tl.store(at, acc.to(grad_x_ptr.dtype.element_ty), mask=rows[:, None] & columns)


@triton.jit
def _conv_transpose_grad_weight(
    grad_y_ptr, x_ptr,                       # [N, OH, OW, CO], [N, H, W, CI]
    partial_ptr,                             # [splits, CI, KH, KW, CO]
    batch, height, width, out_height, out_width, channels, out_channels, steps,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum over `steps` blocks of pixels of x[pixel, ci] dy[pixel under a tap, co], for one tap a program."""
    across, down = tl.cdiv(out_channels, BLOCK_N), tl.cdiv(channels, BLOCK_M)
    column = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    rest = tl.program_id(0) // across
    row = rest % down * BLOCK_M + tl.arange(0, BLOCK_M)
    tap = rest // down % (KH * KW)
    split = rest // down // (KH * KW)
    # Positions move by a block of pixels without divisions: so many samples, lines and pixels, with carries.
    offs_k = tl.arange(0, BLOCK_K)
    pixels = batch * height * width
    first = split * steps * BLOCK_K
    sample, y, x = position(first + offs_k, height, width)
    block = tl.full((), BLOCK_K, tl.int32)
    block_sample, block_y, block_x = position(block, height, width)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(steps):
        a_ptr = x_ptr + first.to(tl.int64) * channels
        a_mask = (first + offs_k < pixels)[:, None] & (row < channels)[None, :]
        a = tl.load(a_ptr + (offs_k[:, None] * channels + row[None, :]), mask=a_mask, other=0.0)
        source_y = y * SH - PH + tap // KW
        source_x = x * SW - PW + tap % KW
        seen = (source_y >= 0) & (source_y < out_height) & (source_x >= 0) & (source_x < out_width) & (sample < batch)
        source = (sample * out_height + source_y) * out_width + source_x
        b_offs = source[:, None].to(tl.int64) * out_channels + column[None, :]
        b_mask = seen[:, None] & (column < out_channels)[None, :]
        b = tl.load(grad_y_ptr + b_offs, mask=b_mask, other=0.0)
        acc = dot(tl.trans(a), b, acc, PRECISION, UPCAST)
        first += BLOCK_K
        x += block_x
        carry = x >= width
        x = tl.where(carry, x - width, x)
        y += tl.where(carry, block_y + 1, block_y)
        carry = y >= height
        y = tl.where(carry, y - height, y)
        sample += tl.where(carry, block_sample + 1, block_sample)
    at = (split.to(tl.int64) * channels + row[:, None]) * (KH * KW) + tap
    mask = (row < channels)[:, None] & (column < out_channels)[None, :]
    tl.store(partial_ptr + at * out_channels + column[None, :], acc.to(partial_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits(partial_ptr, grad_ptr, count, splits, BLOCK: tl.constexpr):
    """[splits, count] -> [count], added in the order of the splits."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(partial_ptr + offs, mask=mask, other=0.0)
        partial_ptr += count
    tl.store(grad_ptr + offs, total.to(grad_ptr.dtype.element_ty), mask=mask)


def _multiplier(x):
    """How tl.dot multiplies: in TF32 only where torch lets cuDNN's convolutions do so."""
    tf32 = compiled(x) and reads(lambda: torch.backends.cudnn.conv.fp32_precision) == "tf32"
    return dict(PRECISION="tf32" if tf32 else "ieee", UPCAST=interpreting() and x.dtype is torch.bfloat16)


def _block(size, most):
    """A power of two that tl.dot takes, large enough for `size` or the most there is."""
    return min(max(next_power_of_2(size), 16), most)


def _tile(name, x, rows, columns, reduced, copies=1, most_rows=128, stages=NUM_STAGES):
    """BLOCK_M, BLOCK_N, BLOCK_K and how to multiply: 128 x 64 x 64 of 16 bits, less of more bits or of small sizes."""
    multiplier = _multiplier(x)
    block_n, block_k = _block(columns, 64), _block(reduced, 128 // x.element_size())
    programs = copies * ceil_div(rows, 128) * ceil_div(columns, block_n)
    block_m = min(128 if programs >= PROGRAMS // 2 else 64, most_rows)
    if x.dtype is torch.float32 and multiplier["PRECISION"] == "ieee":  # no matrix instructions: smaller tiles
        block_m, block_n, block_k, name = 64, min(block_n, 32), 16, f"{name}_ieee"
    chosen = launch(
        f"conv_transpose/{name}", x, (rows, columns, reduced),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=NUM_WARPS, num_stages=stages,
    )  # fmt: skip
    return chosen | multiplier


def _geometry(kernel, stride, padding):
    return dict(zip(("KH", "KW", "SH", "SW", "PH", "PW"), (*kernel, *stride, *padding), strict=True))


def _phase_strides(plane, kernel, stride):
    """The stride along a dimension of one pixel does not matter: with the kernel's size each phase has one tap."""
    return tuple(k if h == 1 else s for h, k, s in zip(plane, kernel, stride, strict=True))


def _require(first, second, channels, batch=None):
    """Raise unless both are 4-d, of one dtype and device, `first` has the channels and `second` the batch.

    Kernels read by address; the public ops have checked already, with better words.
    """
    if (
        first.dim() != 4
        or second.dim() != 4
        or first.size(1) != channels
        or batch not in (None, second.size(0))
        or first.dtype is not second.dtype
        or first.device != second.device
    ):
        raise ValueError(
            f"genai_fast: expected two 4-d tensors of one dtype, device and batch, the first with {channels} channels,"
            f" got {first.dtype} {tuple(first.shape)} on {first.device}, {second.dtype} {tuple(second.shape)}"
            f" on {second.device}"
        )


def _forward(x, weight, bias, stride, padding, output_padding, activation, slope, with_moments):
    """(y, partial moments [3, groups, CO] or None)."""
    _require(x, weight, weight.size(0))
    x, weight = channels_last(x), channels_last(weight)
    kernel, plane = tuple(weight.shape[2:]), tuple(x.shape[2:])
    batch, channels, out_channels = x.size(0), x.size(1), weight.size(1)
    out = output_size(plane, kernel, stride, padding, output_padding)
    y = empty_channels_last(x, batch, out_channels, *out)
    (bias,) = require_channels(y, bias)
    if not y.numel():
        return y, None
    together = out_channels <= FEW_CHANNELS and not with_moments
    if not together:
        stride = _phase_strides(plane, kernel, stride)
    phases = stride[0] * stride[1]
    rows = batch * ceil_div(out[0], stride[0]) * ceil_div(out[1], stride[1])
    copies, columns = (1, phases * out_channels) if together else (phases, out_channels)
    stages = FEW_STAGES if together else NUM_STAGES
    tile = _tile("few_forward" if together else "forward", x, rows, columns, channels, copies, stages=stages)
    tiles = ceil_div(rows, tile["BLOCK_M"])
    partial = x.new_empty((3, tiles * phases, out_channels), dtype=torch.float32) if with_moments else None
    _conv_transpose_forward[(tiles * ceil_div(columns, tile["BLOCK_N"]) * copies,)](
        x, weight, bias, y, partial, batch, *plane, *out, channels, out_channels, tiles * phases * out_channels, slope,
        **_geometry(kernel, stride, padding), TOGETHER=together, ACTIVATION=activation,
        EVEN=channels % tile["BLOCK_K"] == 0, **tile,
    )  # fmt: skip
    return y, partial


def conv_transpose(x, weight, bias, stride, padding, output_padding, activation, slope):
    return _forward(x, weight, bias, stride, padding, output_padding, activation, slope, False)[0]


def conv_transpose_statistics(
    x, weight, bias, running_mean, running_var, momentum, eps, stride, padding, output_padding
):
    y, partial = _forward(x, weight, bias, stride, padding, output_padding, "none", 0.0, True)
    require_channels(y, running_mean, running_var, dtype=None)
    if partial is None:
        raise ValueError(f"genai_fast: expected a batch to take statistics of, got x of shape {tuple(x.shape)}")
    count = y.numel() // y.size(1)
    return y, *combine_moments(partial, running_mean, running_var, count, momentum, eps)


def conv_transpose_grad_input(grad_y, weight, size, stride, padding):
    _require(grad_y, weight, weight.size(1))
    grad_y, weight = channels_last(grad_y), channels_last(weight)
    batch, channels, out_channels = grad_y.size(0), weight.size(0), weight.size(1)
    grad_x = empty_channels_last(grad_y, batch, channels, *size)
    if not grad_x.numel():
        return grad_x
    kernel, rows = tuple(weight.shape[2:]), batch * size[0] * size[1]
    few = out_channels <= FEW_CHANNELS
    name, taps = ("few_grad_input", kernel[0] * kernel[1]) if few else ("grad_input", 1)
    tile = _tile(name, grad_y, rows, channels, out_channels * taps)
    even = {} if few else {"EVEN": out_channels % tile["BLOCK_K"] == 0}
    grid = (ceil_div(rows, tile["BLOCK_M"]) * ceil_div(channels, tile["BLOCK_N"]),)
    (_few_grad_input if few else _conv_transpose_grad_input)[grid](
        grad_y, weight, grad_x, batch, *size, *grad_y.shape[2:], channels, out_channels,
        **_geometry(kernel, stride, padding), **even, **tile,
    )  # fmt: skip
    return grad_x


def conv_transpose_grad_weight(grad_y, x, kernel_size, stride, padding, as_channels_last):
    _require(grad_y, x, grad_y.size(1), grad_y.size(0))
    grad_y, x = channels_last(grad_y), channels_last(x)
    batch, channels, out_channels = x.size(0), x.size(1), grad_y.size(1)
    grad = empty_channels_last(x, channels, out_channels, *kernel_size)
    if x.numel():
        _grad_weight(grad, grad_y, x, (batch, *x.shape[2:], *grad_y.shape[2:], channels, out_channels), stride, padding)
    else:
        grad.zero_()
    return grad if as_channels_last else grad.contiguous()


def _grad_weight(grad, grad_y, x, sizes, stride, padding):
    """Writes the weight's gradient into `grad`, which is channels last."""
    channels, out_channels, *kernel = grad.shape
    taps, pixels = kernel[0] * kernel[1], x.numel() // channels
    few = out_channels <= FEW_CHANNELS
    columns = taps * out_channels if few else out_channels
    most_rows = 64 if channels <= 64 or x.dtype is torch.float32 else 128
    name = "few_grad_weight" if few else "grad_weight"
    tile = _tile(name, x, channels, columns, pixels, PROGRAMS, most_rows)
    programs = ceil_div(channels, tile["BLOCK_M"]) * ceil_div(columns, tile["BLOCK_N"]) * (1 if few else taps)
    # The number of splits follows from the sizes alone, so that every run adds in the same order.
    blocks = ceil_div(pixels, tile["BLOCK_K"])
    steps = ceil_div(blocks, min(ceil_div(PROGRAMS, programs), ceil_div(blocks, LEAST_STEPS)))
    splits = ceil_div(blocks, steps)
    partial = grad if splits == 1 else x.new_empty(splits * grad.numel(), dtype=torch.float32)
    (_few_grad_weight if few else _conv_transpose_grad_weight)[(programs * splits,)](
        grad_y, x, partial, *sizes, steps, **_geometry(kernel, stride, padding), **tile
    )
    if splits > 1:
        grid = (ceil_div(grad.numel(), SUM_ELEMENTS),)
        _sum_splits[grid](partial, grad, grad.numel(), splits, BLOCK=SUM_ELEMENTS, num_warps=NUM_WARPS)
