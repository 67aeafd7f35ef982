"""The random stream of philox.py as Triton functions."""

import triton
import triton.language as tl

from genai_fast.kernels.common.math_triton import minus_two_log, sincos_turn


@triton.jit
def _box_muller(even, odd):
    u = (even >> 9).to(tl.int32).to(tl.float32) * (1.0 / 8388608.0) + (0.5 / 8388608.0)
    radius = tl.sqrt(minus_two_log(u))
    sine, cosine = sincos_turn(odd)
    return radius * cosine, radius * sine


@triton.jit
def words(seed, counter):
    """The four uint32 words of each int64 counter; seed is an int64 scalar."""
    c0 = (counter & 0xFFFFFFFF).to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = c2
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # One wide product each: tl.philox multiplies twice, for the high and the low half.
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def normals(seed, counter):
    """[..., N] int64 counters -> [..., N, 2, 2] normals, in the order of the stream when flattened."""
    w0, w1, w2, w3 = words(seed, counter)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3))
