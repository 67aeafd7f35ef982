"""Products of tiles for Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b, with a rounded to b's type.

    UPCAST: Triton's interpreter multiplies bfloat16 as if it were integers, and rounds to it by cutting off.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    else:
        a = a.to(b.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION)
