"""rotary on the CPU: allocates the result and calls cpu_kernel.cpp."""

from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address
from genai_fast.kernels.rotary.layout import between_samples, ends_of, operands, strides_of
from genai_fast.kernels.rotary.reference import heads_inside, in_order_of


def rotary(x, cos, sin, positions, offset, interleaved, inverse, full=False, sections=()):
    x, cos, sin, positions, rotated = operands(x, cos, sin, positions, full, sections)
    y, by_token = in_order_of(x), heads_inside(x)
    given = x.transpose(1, 2) if by_token else x
    (*of_cos, cos_step), (*of_sin, sin_step) = (strides_of(t, sections) for t in (cos, sin))
    cpp.rotary(
        address(x), *given.stride()[:3], DTYPE_CODE[x.dtype], address(cos), *of_cos, address(sin), *of_sin,
        DTYPE_CODE[cos.dtype], cos_step, sin_step, *ends_of(sections, rotated), cos.size(-2), address(positions),
        between_samples(positions), offset,
        address(y), *given.shape, rotated, by_token, interleaved, inverse, full
    )  # fmt: skip
    return y
