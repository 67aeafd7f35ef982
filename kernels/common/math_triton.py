"""float32 functions for Triton kernels: the formulas of math.h, so that GPU, interpreter and C++ stay close."""

import triton
import triton.language as tl

from genai_fast.kernels.common.extension import interpreting

INTERPRETED = tl.constexpr(interpreting())  # where no PTX runs


@triton.jit
def exp2(x):
    """2^x in one instruction, to two units in the last place; 0 below 2^-126. tl.exp2 takes four to go further."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def reciprocal(x):
    """1 / x in one instruction, to one unit in the last place; 0 where that is below 2^-126. A division takes eight."""
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


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
def expm1_negative(x):
    """e^x - 1 for x <= 0, relatively to a few units in the last place, also near 0."""
    shifted = x * 1.44269504088896341 + 12582912.0  # as in exp
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    p = 1.9875691500e-4
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + (127 << 23)).to(tl.float32, bitcast=True)
    return tl.where(x < -30.0, -1.0, power * (p * (r * r) + r) + (power - 1.0))


@triton.jit
def minus_two_log(u):
    """-2 ln u for normal u in (0, 1), accurate near 1 too, where lg2.approx would be off by 2**-22 absolutely."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = 2.02137753e-1
    p = p * f - 3.24451625e-1
    p = p * f + 3.45016658e-1
    p = p * f - 3.98003310e-1
    p = p * f + 4.99398172e-1
    p = p * f - 6.66701198e-1
    p = p * f + 1.00000727
    p = p * f - 1.99999988
    return exponent.to(tl.float32) * -1.38629436 + p * f


@triton.jit
def sincos_turn(word):
    """sin and cos of 2 pi (word >> 8) / 2**24 for uint32 words, reduced to the nearest half turn in integers."""
    t = ((word << 1).to(tl.int32, bitcast=True) >> 9).to(tl.float32) * 3.74507039e-7
    sign = tl.add(word, 0x40000000, sanitize_overflow=False) & 0x80000000
    z = t * t
    s = (z * 2.60005459e-6 - 1.98066147e-4) * z + 8.33301712e-3
    s = s * z - 1.66666567e-1
    s = t * z * s + t
    c = (z * 2.31943850e-5 - 1.38559274e-3) * z + 4.16639894e-2
    c = c * z - 4.99999315e-1
    c = c * z + 1.0
    sine = (s.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    cosine = (c.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return sine, cosine


@triton.jit
def log1p_unit(e):
    """ln(1 + e) for e in [0, 1]."""
    p = -8.53910483e-3
    p = p * e + 4.40892801e-2
    p = p * e - 1.07681252e-1
    p = p * e + 1.77452117e-1
    p = p * e - 2.44954541e-1
    p = p * e + 3.32754791e-1
    p = p * e - 4.99974042e-1
    p = p * e + 9.99999821e-1
    return p * e
