"""rotary on the CPU: allocates the result and calls cpu_kernel.cpp."""

from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address
from genai_fast.kernels.rotary.layout import between_samples, operands
from genai_fast.kernels.rotary.reference import heads_inside, in_order_of


def rotary(x, cos, sin, positions, offset, interleaved, inverse, full=False):
    x, cos, sin, positions, rotated = operands(x, cos, sin, positions, full)
    y, by_token = in_order_of(x), heads_inside(x)
    given = x.transpose(1, 2) if by_token else x
    cpp.rotary(
        address(x), *given.stride()[:3], DTYPE_CODE[x.dtype], address(cos), cos.stride(0), address(sin),
        sin.stride(0), DTYPE_CODE[cos.dtype], cos.size(0), address(positions), between_samples(positions), offset,
        address(y), *given.shape, rotated, by_token, interleaved, inverse, full
    )  # fmt: skip
    return y
