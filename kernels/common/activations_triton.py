"""The activations of activations.py as Triton functions, on float32; ACTIVATION is its name."""

import triton
import triton.language as tl

from genai_fast.kernels.common.math_triton import exp


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + exp(-z))


@triton.jit
def tanh(z):
    """Relatively accurate near 0 too."""
    a = tl.abs(z)
    q = z * z
    p = -5.70498872745e-3  # odd polynomial below 0.625 (Cephes)
    p = p * q + 2.06390887954e-2
    p = p * q - 5.37397155531e-2
    p = p * q + 1.33314422036e-1
    p = p * q - 3.33332819422e-1
    near = p * q * z + z
    far = 1.0 - 2.0 / (exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, near, tl.where(z < 0.0, -far, far))


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z > 0.0, z, tl.where(z != z, z, 0.0))
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0.0, z, slope * z)
    elif ACTIVATION == "tanh":
        z = tanh(z)
    elif ACTIVATION == "sigmoid":
        z = sigmoid(z)
    elif ACTIVATION == "silu":
        z = z * sigmoid(z)
    return z


@triton.jit
def times_derivative(grad, z, slope, ACTIVATION: tl.constexpr):
    """grad * (d activate / dz), from z."""
    if ACTIVATION == "relu":
        grad = tl.where(z > 0.0, grad, 0.0 * grad)
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(z > 0.0, grad, slope * grad)
    elif ACTIVATION == "tanh":
        y = tanh(z)
        grad = grad * (1.0 - y * y)
    elif ACTIVATION == "sigmoid":
        y = sigmoid(z)
        grad = grad * (y * (1.0 - y))
    elif ACTIVATION == "silu":
        y = sigmoid(z)
        grad = grad * (y * (1.0 + z * (1.0 - y)))
    return grad


@triton.jit
def times_derivative_from_output(grad, y, slope, ACTIVATION: tl.constexpr):
    """The same from y = activate(z); not for silu."""
    if ACTIVATION == "tanh":
        grad = grad * (1.0 - y * y)
    elif ACTIVATION == "sigmoid":
        grad = grad * (y * (1.0 - y))
    else:
        grad = times_derivative(grad, y, slope, ACTIVATION)
    return grad
