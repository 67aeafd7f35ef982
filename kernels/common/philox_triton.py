"""The random stream of philox.py as Triton functions."""

import triton
import triton.language as tl

from genai_fast.kernels.common.math_triton import log_positive, sincos_turn


@triton.jit
def _box_muller(even, odd):
    u = ((even >> 9).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    radius = tl.sqrt(-2.0 * log_positive(u))
    sine, cosine = sincos_turn((odd >> 8).to(tl.int32))
    return radius * cosine, radius * sine


@triton.jit
def words(seed, counter):
    """The four uint32 words of each int64 counter; seed is an int64 scalar."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def normals(seed, counter):
    """[..., N] int64 counters -> [..., N, 2, 2] normals, in the order of the stream when flattened."""
    w0, w1, w2, w3 = words(seed, counter)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3))
