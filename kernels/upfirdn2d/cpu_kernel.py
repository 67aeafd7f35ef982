"""upfirdn2d on the CPU: allocates the result and calls cpu_kernel.cpp."""

from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address
from genai_fast.kernels.upfirdn2d.layout import images, require


def upfirdn2d(x, filter, up, down, padding, gain, flip):
    vertical, horizontal = require(x, filter, up, down, padding)
    x, y, planes, inner = images(x, (vertical.out, horizontal.out))
    filter = filter.contiguous()
    if y.numel():
        cpp.upfirdn2d(
            address(x), DTYPE_CODE[x.dtype], address(filter), filter.dim() == 1, address(y), planes, inner, *vertical,
            *horizontal, gain, flip
        )  # fmt: skip
    return y
