"""The activations of fused blocks, one table: formula, derivative, and which derivatives the result alone gives.

`activations.h` and `activations_triton.py` hold the same formulas for the kernels. An activation has at most one
parameter, here called slope: leaky_relu's slope, elu's alpha, softplus' beta (its threshold is PyTorch's 20). prelu
has a tensor of slopes, one for each channel and with a gradient: ops that take it say so.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

# In the order of the kernels' codes.
ACTIVATIONS = (
    "none", "relu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "elu", "relu6", "selu", "hardswish",
    "softplus", "mish",
)  # fmt: skip
ACTIVATION_CODE = {name: code for code, name in enumerate(ACTIVATIONS)}
DEFAULT_SLOPE = {"leaky_relu": 0.2, "elu": 1.0, "softplus": 1.0}  # of those that have one
_TWO_ROOT_TWO_OVER_PI = 1.5957691216057308  # gelu_tanh(z) = z sigmoid(this (z + 0.044715 z^3))
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
_SOFTPLUS_THRESHOLD = 20.0

_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda z: z, "relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "relu6": F.relu6, "selu": F.selu, "hardswish": F.hardswish,
    "mish": F.mish,
}  # fmt: skip
_WITH_SLOPE: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "leaky_relu": F.leaky_relu, "elu": F.elu, "softplus": F.softplus,
    "prelu": lambda z, slopes: torch.where(z > 0, z, slopes * z),
}  # fmt: skip


def slope_of(activation: str, slope: Any) -> Any:
    """The slope itself, or for None the activation's own."""
    return DEFAULT_SLOPE.get(activation, 0.0) if slope is None else slope


def code_beside(slopes: torch.Tensor | None, activation: str) -> int:
    """The kernels' code of an activation, where a tensor of slopes makes it prelu. Raises ValueError on one without."""
    if (slopes is None) is (activation == "prelu"):
        raise ValueError(f"genai_fast: expected slopes with activation 'prelu' and no other, got {activation!r}")
    return len(ACTIVATIONS) if activation == "prelu" else ACTIVATION_CODE[activation]


def activate(z: torch.Tensor, activation: str, slope: Any) -> torch.Tensor:
    """activation(z); slope: a number, None for the activation's own, or for prelu a tensor that spreads over z."""
    if activation in _WITH_SLOPE:
        return _WITH_SLOPE[activation](z, slope_of(activation, slope))
    return _PLAIN[activation](z)


def derivative(z: torch.Tensor, activation: str, slope: Any) -> torch.Tensor:
    """d activate / dz, itself differentiable; at kinks, and beyond them, as PyTorch has it."""
    if activation == "prelu":
        return torch.where(z > 0, torch.ones_like(z), slope)
    if activation in ("none", "relu", "leaky_relu"):
        below = {"none": 1.0, "relu": 0.0, "leaky_relu": slope}[activation]
        return torch.where(z > 0, torch.ones_like(z), torch.full_like(z, below))
    if activation == "relu6":
        return torch.where((z > 0) & (z < 6), torch.ones_like(z), torch.zeros_like(z))
    if activation in ("elu", "selu"):
        scale, alpha = (1.0, slope) if activation == "elu" else (_SELU_SCALE, _SELU_SCALE * _SELU_ALPHA)
        # At 0 the derivative from below, and the second one from above.
        below = torch.where(z == 0, torch.full_like(z, alpha), alpha * torch.exp(z.clamp(max=0)))
        return torch.where(z > 0, torch.full_like(z, scale), below)
    if activation == "hardswish":
        return torch.where(z >= 3, torch.ones_like(z), torch.where(z <= -3, torch.zeros_like(z), z / 3 + 0.5))
    if activation == "softplus":
        return torch.where(z * slope > _SOFTPLUS_THRESHOLD, torch.ones_like(z), torch.sigmoid(z * slope))
    if activation == "tanh":
        return 1.0 - torch.tanh(z) ** 2
    if activation == "mish":
        gate = torch.tanh(F.softplus(z))
        return gate + z * torch.sigmoid(z) * (1.0 - gate * gate)
    if activation == "gelu":  # Phi(z) + z phi(z)
        return 0.5 * torch.erfc(z * -(0.5**0.5)) + z * torch.exp(-0.5 * z * z) * (0.5 / torch.pi) ** 0.5
    if activation == "gelu_tanh":
        s = torch.sigmoid(_TWO_ROOT_TWO_OVER_PI * (z + 0.044715 * z**3))
        return s * (1.0 + z * (1.0 - s) * (_TWO_ROOT_TWO_OVER_PI * (1.0 + 0.134145 * z * z)))
    s = torch.sigmoid(z)
    return s * (1.0 - s) if activation == "sigmoid" else s * (1.0 + z * (1.0 - s))


def output_gives_derivative(activation: str, slope: float) -> bool:
    """Whether the result alone gives the derivative, so that backward need not keep the input.

    From what elu or softplus make of a negative number it would have no digits left, and act_dropout, which scales its
    result, would not find relu6's 6 again.
    """
    return activation in ("none", "relu", "tanh", "sigmoid") or (activation == "leaky_relu" and slope > 0)


def derivative_by_slope(grad_y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """What each element adds to the gradient of prelu's slopes."""
    return torch.where(z > 0, torch.zeros_like(z), grad_y * z)


def derivative_from_output(y: torch.Tensor, activation: str, slope: float) -> torch.Tensor:
    """The same derivative from y = activate(z), itself differentiable; only where `output_gives_derivative`."""
    if activation == "tanh":
        return 1.0 - y * y
    if activation == "sigmoid":
        return y * (1.0 - y)
    return derivative(y, activation, slope)  # y has the sign of z
