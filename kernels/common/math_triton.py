"""float32 functions for Triton kernels: the formulas of math.h, so that GPU, interpreter and C++ stay close."""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x to a few units in the last place. tl.exp rounds x log2(e) first: 80 units off at x = 80."""
    shifted = x * 1.44269504088896341 + 12582912.0  # rounds to an integer, which then stands in the low bits too
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    half = ((shifted.to(tl.int32, bitcast=True) << 23) + (126 << 23)).to(tl.float32, bitcast=True)
    value = tl.exp2(r * 1.44269504088896341 + 1.0) * half
    return tl.where(x > 88.7228394, float("inf"), tl.where(x < -87.0, 0.0, value))


@triton.jit
def log1p_near(f):
    """ln(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]; the polynomial of math.h."""
    p = 7.0376836292e-2
    p = p * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    square = f * f
    return p * f * square + (f - 0.5 * square)


@triton.jit
def log_positive(x):
    """ln x for normal positive x, accurate near 1 too, where lg2.approx would be off by 2**-22 absolutely."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    return exponent.to(tl.float32) * 0.693147180559945 + log1p_near(m - 1.0)


@triton.jit
def sincos_turn(turn24):
    """sin and cos of 2 pi turn24 / 2**24, reduced to the nearest quarter turn in integers."""
    quarter = (turn24 + (1 << 21)) >> 22
    t = (turn24 - (quarter << 22)).to(tl.float32) * 3.74507028e-7
    z = t * t
    s = (z * -1.9515295891e-4 + 8.3321608736e-3) * z - 1.6666654611e-1
    s = t * z * s + t
    c = (z * 2.443315711809948e-5 - 1.388731625493765e-3) * z + 4.166664568298827e-2
    c = z * z * c + (1.0 - 0.5 * z)
    swap = (quarter & 1) != 0
    sine = tl.where(swap, c, s).to(tl.int32, bitcast=True) ^ ((quarter & 2) << 30)
    cosine = tl.where(swap, s, c).to(tl.int32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    return sine.to(tl.float32, bitcast=True), cosine.to(tl.float32, bitcast=True)


@triton.jit
def log1p_unit(e):
    """ln(1 + e) for e in [0, 1]."""
    upper = e > 0.41421356
    return log1p_near(tl.where(upper, 0.5 * e - 0.5, e)) + tl.where(upper, 0.693147180559945, 0.0)
