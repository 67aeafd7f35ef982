"""The activations of fused blocks, one table: formula, derivative, and which derivatives the result alone gives.

`activations.h` and `activations_triton.py` hold the same formulas for the kernels.
"""

import torch
import torch.nn.functional as F

# The kernels' codes. The derivative at 0 is PyTorch's: 0 for relu, the slope for leaky_relu.
ACTIVATION_CODE = {"none": 0, "relu": 1, "leaky_relu": 2, "tanh": 3, "sigmoid": 4, "silu": 5, "gelu": 6, "gelu_tanh": 7}
ACTIVATIONS = tuple(ACTIVATION_CODE)
_TWO_ROOT_TWO_OVER_PI = 1.5957691216057308  # gelu_tanh(z) = z sigmoid(this (z + 0.044715 z^3))


def activate(z: torch.Tensor, activation: str, slope: float) -> torch.Tensor:
    if activation == "none":
        return z
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, slope)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    return {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu}[activation](z)


def derivative(z: torch.Tensor, activation: str, slope: float) -> torch.Tensor:
    """d activate / dz, itself differentiable."""
    if activation in ("none", "relu", "leaky_relu"):
        below = {"none": 1.0, "relu": 0.0, "leaky_relu": slope}[activation]
        return torch.where(z > 0, torch.ones_like(z), torch.full_like(z, below))
    if activation == "tanh":
        return 1.0 - torch.tanh(z) ** 2
    if activation == "gelu":  # Phi(z) + z phi(z)
        return 0.5 * torch.erfc(z * -(0.5**0.5)) + z * torch.exp(-0.5 * z * z) * (0.5 / torch.pi) ** 0.5
    if activation == "gelu_tanh":
        s = torch.sigmoid(_TWO_ROOT_TWO_OVER_PI * (z + 0.044715 * z**3))
        return s * (1.0 + z * (1.0 - s) * (_TWO_ROOT_TWO_OVER_PI * (1.0 + 0.134145 * z * z)))
    s = torch.sigmoid(z)
    return s * (1.0 - s) if activation == "sigmoid" else s * (1.0 + z * (1.0 - s))


def output_gives_derivative(activation: str, slope: float) -> bool:
    """Whether the result alone gives the derivative, so that backward need not keep the input."""
    return activation in ("none", "relu", "tanh", "sigmoid") or (activation == "leaky_relu" and slope > 0)


def derivative_from_output(y: torch.Tensor, activation: str, slope: float) -> torch.Tensor:
    """The same derivative from y = activate(z), itself differentiable; only where `output_gives_derivative`."""
    if activation == "tanh":
        return 1.0 - y * y
    if activation == "sigmoid":
        return y * (1.0 - y)
    return derivative(y, activation, slope)  # y has the sign of z
