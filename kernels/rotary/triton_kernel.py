"""rotary on the GPU: a program turns the pairs of some rows of one sample."""

from __future__ import annotations

import triton
import triton.language as tl

from genai_fast.kernels.common.launch import ceil_div, next_power_of_2
from genai_fast.kernels.rotary.layout import between_samples, ends_of, operands, strides_of
from genai_fast.kernels.rotary.reference import heads_inside, in_order_of

PAIRS = 1024  # a program: 8 a thread, so that a thread loads 16 bytes of bfloat16 at a time
NUM_WARPS = 4


@triton.jit(do_not_specialize=["offset"])
def _rotary(
    x_ptr, cos_ptr, sin_ptr,                 # [batch, second, third, COLUMNS], [axes, samples, known, columns] twice
    positions_ptr, y_ptr,                    # [batch or 1, tokens] or None; x's shape, dense
    second, third, x_batch, x_second, x_third,
    cos_axis, cos_sample, cos_row, sin_axis, sin_sample, sin_row, known, positions_stride, offset, sign, blocks,
    BY_TOKEN: tl.constexpr, INTERLEAVED: tl.constexpr, FULL: tl.constexpr, SWAPPED: tl.constexpr,
    COLUMNS: tl.constexpr, HALF: tl.constexpr, COS_STEP: tl.constexpr, SIN_STEP: tl.constexpr,
    OF_SAMPLES: tl.constexpr, END_0: tl.constexpr, END_1: tl.constexpr, END_2: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """y = (a cos - b sin, b cos + a sin) for the HALF pairs (a, b) of each row; a position beyond the table gives NaN.

    Tokens are the second dimension if BY_TOKEN, else the third. FULL: a and b have a cosine and a sine each, the sines
    SWAPPED in the transpose. Pairs up to END_0 turn by the first axis, up to END_1 by the second. BLOCK holds HALF, and
    REST the channels that stay.
    """
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    i = row // third
    j = row % third
    inside = row < second * third
    token = i if BY_TOKEN else j
    if positions_ptr is not None:
        position = tl.load(positions_ptr + sample * positions_stride + token, mask=inside, other=-1)
    else:
        position = token.to(tl.int64) + offset
    x_ptr += sample * x_batch + (i.to(tl.int64) * x_second + j.to(tl.int64) * x_third)[:, None]
    y_ptr += ((sample * second * third + row) * COLUMNS)[:, None]

    pair = tl.arange(0, BLOCK)[None, :]
    mask = inside[:, None] & (pair < HALF)
    looked_up = mask & ((position >= 0) & (position < known))[:, None]
    position = position[:, None]
    apart: tl.constexpr = (1 if INTERLEAVED else HALF) if FULL else 0
    column = 2 * pair if FULL and INTERLEAVED else pair
    cos_ptr += position * cos_row + column * COS_STEP
    sin_ptr += position * sin_row + column * SIN_STEP
    if OF_SAMPLES:
        cos_ptr += sample * cos_sample
        sin_ptr += sample * sin_sample
    if END_0 < HALF:
        axis = ((pair >= END_0).to(tl.int32) + (pair >= END_1).to(tl.int32) + (pair >= END_2).to(tl.int32)).to(tl.int64)
        cos_ptr += axis * cos_axis
        sin_ptr += axis * sin_axis
    c = tl.load(cos_ptr, mask=looked_up, other=float("nan")).to(tl.float32)
    to_sin: tl.constexpr = apart * SIN_STEP if SWAPPED else 0
    s = tl.load(sin_ptr + to_sin, mask=looked_up, other=float("nan")).to(tl.float32) * sign
    c_b, s_b = c, s
    if FULL:
        c_b = tl.load(cos_ptr + apart * COS_STEP, mask=looked_up, other=float("nan")).to(tl.float32)
        s_b = tl.load(sin_ptr + (apart * SIN_STEP - to_sin), mask=looked_up, other=float("nan")).to(tl.float32) * sign
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK)[None, :]
        mask = inside[:, None] & (both < 2 * HALF)
        x = tl.load(x_ptr + both, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [ROWS, BLOCK, 2]))
        y = tl.reshape(tl.join(a * c - b * s, b * c_b + a * s_b), [ROWS, 2 * BLOCK])
        tl.store(y_ptr + both, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        a = tl.load(x_ptr + pair, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + HALF + pair, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + pair, (a * c - b * s).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_ptr + HALF + pair, (b * c_b + a * s_b).to(y_ptr.dtype.element_ty), mask=mask)
    if REST:
        more = 2 * HALF + tl.arange(0, REST)[None, :]
        mask = inside[:, None] & (more < COLUMNS)
        tl.store(y_ptr + more, tl.load(x_ptr + more, mask=mask), mask=mask)


def rotary(x, cos, sin, positions, offset, interleaved, inverse, full=False, sections=()):
    x, cos, sin, positions, rotated = operands(x, cos, sin, positions, full, sections)
    y, by_token = in_order_of(x), heads_inside(x)
    if not y.numel():
        return y
    given = x.transpose(1, 2) if by_token else x
    batch, second, third, columns = given.shape
    half = rotated // 2
    block = next_power_of_2(half)
    tile = max(PAIRS // block, 1)
    blocks = ceil_div(second * third, tile)
    rest = columns - 2 * half
    (*of_cos, cos_step), (*of_sin, sin_step) = (strides_of(t, sections) for t in (cos, sin))
    end_0, end_1, end_2 = ends_of(sections, rotated)
    _rotary[(batch * blocks,)](
        x, cos, sin, positions, y, second, third, *given.stride()[:3], *of_cos, *of_sin, cos.size(-2),
        between_samples(positions), offset, -1.0 if inverse else 1.0, blocks,
        BY_TOKEN=by_token, INTERLEAVED=interleaved, FULL=full, SWAPPED=full and inverse, COLUMNS=columns, HALF=half,
        COS_STEP=cos_step, SIN_STEP=sin_step, OF_SAMPLES=of_cos[1] != 0 or of_sin[1] != 0, END_0=end_0, END_1=end_1,
        END_2=end_2, ROWS=tile, BLOCK=block, REST=next_power_of_2(rest) if rest else 0, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y
