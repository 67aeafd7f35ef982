"""The activations of activations.py as Triton functions, on float32; ACTIVATION is its name.

NARROW: the result is stored in 16 bits, so exponentials, quotients and polynomials of a relative error of 1e-5 serve.
"""

import triton
import triton.language as tl

from genai_fast.kernels.common.math_triton import exp, exp2, expm1_negative, log1p_unit, reciprocal


@triton.jit
def sigmoid(z, NARROW: tl.constexpr = False):
    return reciprocal(1.0 + exp2(z * -1.44269504089)) if NARROW else 1.0 / (1.0 + exp(-z))


@triton.jit
def tanh(z, NARROW: tl.constexpr = False):
    """Relatively accurate near 0 too."""
    a = tl.abs(z)
    q = z * z
    if NARROW:
        p = 0.133333333 * q - 0.333333333
        far = 1.0 - 2.0 * reciprocal(1.0 + exp2(a * 2.88539008178))
        near = a < 0.25
    else:
        p = -5.70498872745e-3  # odd polynomial below 0.625 (Cephes)
        p = p * q + 2.06390887954e-2
        p = p * q - 5.37397155531e-2
        p = p * q + 1.33314422036e-1
        p = p * q - 3.33332819422e-1
        far = 1.0 - 2.0 / (exp(2.0 * a) + 1.0)
        near = a < 0.625
    return tl.where(near, p * q * z + z, tl.where(z < 0.0, -far, far))


@triton.jit
def normal_tail(a, NARROW: tl.constexpr = False):
    """Of the standard normal beyond a >= 0: its density, and Mills' ratio, both relatively accurate."""
    if NARROW:
        density = exp2(a * (a * -0.721347520444) - 1.32574806473)
        u = reciprocal(a * 0.32 + 1.0)
        p = -1.67378977e-1
        p = p * u + 3.49889636e-1
        p = p * u + 1.24364205e-1
        p = p * u + 3.08443844e-1
        p = p * u + 3.17910999e-1
        p = p * u + 3.20070624e-1
    else:
        t = tl.where(a > 16.0, 16.0, a)
        square = t * t
        rest = tl.fma(t, t, -square)  # what rounding took, which the exponential would magnify
        e = 0.398942280 * exp(-0.5 * square)
        density = e - e * (0.5 * rest)
        u = 1.0 / (t * 0.3515625 + 1.0)
        p = -7.36785382e-2
        p = p * u + 3.59971434e-1
        p = p * u - 6.29488826e-1
        p = p * u + 3.78674388e-1
        p = p * u - 4.82832119e-2
        p = p * u + 2.60355175e-1
        p = p * u + 3.02159786e-1
        p = p * u + 3.52058738e-1
        p = p * u + 3.51545185e-1
    return density, p * u


@triton.jit
def tanh_gate(z, NARROW: tl.constexpr = False):
    """tanh's GELU is z sigmoid(w), w = sqrt(8 / pi) (z + 0.044715 z^3): sigmoid(w), and its derivative by z."""
    if NARROW:
        square = tl.minimum(z * z, 1e4)  # the gate is 0 or 1 long before; a NaN stays in z
        s = sigmoid(z * (square * 7.13548162726e-2 + 1.59576912161), True)
        slope = (s - s * s) * (square * 0.214064448818 + 1.59576912161)
    else:
        square = tl.where(z * z > 1e4, 1e4, z * z)
        w = z * (square * 7.13548162726e-2 + 1.59576912161)
        e = exp(-tl.abs(w))
        s = 1.0 / (1.0 + e)
        slope = e * s * s * (square * 0.214064448818 + 1.59576912161)
        s = tl.where(w < 0.0, e * s, s)
    return s, slope


@triton.jit
def mish_gate(z):
    """Mish is z gate, gate = tanh(ln(1 + e^z)): it, and its derivative by z. With t = e^-|z| nothing overflows."""
    t = exp(-tl.abs(z))
    square = t * t
    above = 2.0 * t + tl.where(z < 0.0, square, 1.0)
    share = 1.0 / (2.0 * tl.where(z < 0.0, 1.0, square) + above)
    return above * share, 4.0 * (1.0 + t) * tl.where(z < 0.0, t, square) * share * share


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr, NARROW: tl.constexpr = False):
    if ACTIVATION == "relu":
        z = tl.where(z > 0.0, z, tl.where(z != z, z, 0.0))
    elif ACTIVATION == "leaky_relu" or ACTIVATION == "prelu":
        z = tl.where(z > 0.0, z, slope * z)
    elif ACTIVATION == "tanh":
        z = tanh(z, NARROW)
    elif ACTIVATION == "sigmoid":
        z = sigmoid(z, NARROW)
    elif ACTIVATION == "silu":
        z = z * sigmoid(z, NARROW)
    elif ACTIVATION == "gelu":
        density, ratio = normal_tail(tl.abs(z), NARROW)
        beyond = density * ratio
        z = z * tl.where(z > 0.0, 1.0 - beyond, beyond)
    elif ACTIVATION == "gelu_tanh":
        gate, _ = tanh_gate(z, NARROW)
        z = z * gate
    elif ACTIVATION == "elu":
        z = tl.where(z > 0.0, z, slope * expm1_negative(tl.where(z > 0.0, 0.0, z)))
    elif ACTIVATION == "relu6":
        z = tl.where(z > 0.0, tl.where(z < 6.0, z, 6.0), tl.where(z != z, z, 0.0))
    elif ACTIVATION == "selu":
        below = 1.75809934085 * expm1_negative(tl.where(z > 0.0, 0.0, z))
        z = tl.where(z > 0.0, 1.05070098736 * z, below)
    elif ACTIVATION == "hardswish":
        gate = z + 3.0
        z = z * (0.166666667 * tl.where(gate > 0.0, tl.where(gate < 6.0, gate, 6.0), 0.0))
    elif ACTIVATION == "softplus":
        b = slope * z
        value = (tl.where(b > 0.0, b, 0.0) + log1p_unit(exp(-tl.abs(b)))) / slope
        z = tl.where(b > 20.0, z, value)
    elif ACTIVATION == "mish":
        gate, _ = mish_gate(z)
        z = z * gate
    return z


@triton.jit
def times_derivative(grad, z, slope, ACTIVATION: tl.constexpr, NARROW: tl.constexpr = False):
    """grad * (d activate / dz), from z."""
    if ACTIVATION == "relu":
        grad = tl.where(z > 0.0, grad, 0.0 * grad)
    elif ACTIVATION == "leaky_relu" or ACTIVATION == "prelu":
        grad = tl.where(z > 0.0, grad, slope * grad)
    elif ACTIVATION == "tanh":
        y = tanh(z, NARROW)
        grad = grad * (1.0 - y * y)
    elif ACTIVATION == "sigmoid":
        y = sigmoid(z, NARROW)
        grad = grad * (y * (1.0 - y))
    elif ACTIVATION == "silu":
        y = sigmoid(z, NARROW)
        grad = grad * (y * (1.0 + z * (1.0 - y)))
    elif ACTIVATION == "gelu":  # Phi(z) + z density(z)
        a = tl.abs(z)
        density, ratio = normal_tail(a, NARROW)
        beyond = density * (ratio - a)
        grad = grad * tl.where(z > 0.0, 1.0 - beyond, beyond)
    elif ACTIVATION == "gelu_tanh":
        gate, slope_of_gate = tanh_gate(z, NARROW)
        grad = grad * (z * slope_of_gate + gate)
    elif ACTIVATION == "elu":
        grad = grad * tl.where(z > 0.0, 1.0, slope * exp(tl.where(z > 0.0, 0.0, z)))
    elif ACTIVATION == "relu6":
        grad = tl.where((z > 0.0) & (z < 6.0), grad, 0.0 * grad)
    elif ACTIVATION == "selu":
        grad = grad * tl.where(z > 0.0, 1.05070098736, 1.75809934085 * exp(tl.where(z > 0.0, 0.0, z)))
    elif ACTIVATION == "hardswish":
        grad = grad * tl.where(z >= 3.0, 1.0, tl.where(z <= -3.0, 0.0, z * 0.333333333 + 0.5))
    elif ACTIVATION == "softplus":
        grad = grad * tl.where(slope * z > 20.0, 1.0, sigmoid(slope * z, NARROW))
    elif ACTIVATION == "mish":
        gate, slope_of_gate = mish_gate(z)
        grad = grad * (z * slope_of_gate + gate)
    return grad


@triton.jit
def times_derivative_by_slope(grad, z):
    """What each element adds to the gradient of prelu's slopes."""
    return tl.where(z > 0.0, 0.0, grad * z)


@triton.jit
def times_derivative_from_output(grad, y, slope, ACTIVATION: tl.constexpr, NARROW: tl.constexpr = False):
    """The same from y = activate(z), where activations.py says that the result gives the derivative."""
    if ACTIVATION == "tanh":
        grad = grad * (1.0 - y * y)
    elif ACTIVATION == "sigmoid":
        grad = grad * (y * (1.0 - y))
    else:
        grad = times_derivative(grad, y, slope, ACTIVATION, NARROW)
    return grad
