"""A linear layer on a few rows, with the norm before it and the activation and sum behind it, for generating text."""

from typing import Any

import torch

from genai_fast.backends import forced_backend
from genai_fast.kernels.common.activations import ACTIVATIONS, DEFAULT_SLOPE
from genai_fast.ops import checks
from genai_fast.ops.dispatch import library_call
from genai_fast.ops.planned import planned
from genai_fast.precision import without_autocast

_OP = "decode_linear"
_SERVED = tuple(name for name in ACTIVATIONS if name not in DEFAULT_SLOPE)  # a slope would be one more argument


@planned
def decode_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = activation(layer_norm(x) weight^T + bias) + residual; without a norm_weight, of x itself.

    For matrices that are read for a few rows of x, where launches and the reading of the weight are all the time.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64, any strides; up to 16 rows for the kernel.
        weight: [N, K] of x's dtype, as nn.Linear's; for the kernel a row takes up to 32 KiB and has no gaps.
        bias: [N] or None for 0.
        norm_weight, norm_bias: [K], of the layer norm over x's last dimension; no norm_weight: no norm.
        eps: added to the norm's variance.
        activation: as in `bias_act`, but those with a slope.
        residual: [..., N] or None for 0.

    All tensors have x's dtype and device; autocast changes nothing.

    Returns: y [..., N] of x's dtype, contiguous. The kernel computes in float32 and rounds once, and up to 16 rows a
        row's bits are the same alone and among others.
    Gradients: none; tensors that require one are refused unless gradients are off (torch.no_grad()).
    Backends: Triton (CUDA, up to 16 rows), reference (elsewhere, and float64). On a CPU `gpt_decode` is the fast way.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Vaswani et al. 2017, arXiv:1706.03762; Ba, Kiros & Hinton 2016, arXiv:1607.06450.
    """
    checks.is_floating(_OP, "x", x)
    if x.dim() == 0 or x.size(-1) == 0:
        raise ValueError(
            f"{_OP}: x: expected [..., K] with K > 0, got shape {tuple(x.shape)}; the last dimension meets weight's"
        )
    checks.is_floating(_OP, "weight", weight)
    if weight.dim() != 2 or weight.size(1) != x.size(-1):
        raise ValueError(
            f"{_OP}: weight: expected [N, {x.size(-1)}] as x has {x.size(-1)} in its last dimension, got shape"
            f" {tuple(weight.shape)}; a matrix [in, out] is transposed with .t()"
        )
    if norm_bias is not None and norm_weight is None:
        raise ValueError(
            f"{_OP}: norm_bias: expected None without a norm_weight, got a tensor; a norm without a weight has one of 1"
        )
    outputs = weight.size(0)
    expected: dict[str, tuple[Any, tuple[int, ...]]] = {
        "weight": (weight, tuple(weight.shape)),
        "bias": (bias, (outputs,)),
        "norm_weight": (norm_weight, (x.size(-1),)),
        "norm_bias": (norm_bias, (x.size(-1),)),
        "residual": (residual, (*x.shape[:-1], outputs)),
    }
    given = {name: pair for name, pair in expected.items() if pair[0] is not None}
    for name, (tensor, shape) in given.items():
        _like_x(name, tensor, shape, x)
    checks.one_of(_OP, "activation", activation, _SERVED)
    eps = checks.real(_OP, "eps", eps, "a finite float >= 0", 0.0)
    checks.needs_no_gradient(_OP, "x", (x, *(tensor for tensor, _ in given.values())))
    settings = (norm_weight, norm_bias, eps, activation, residual)
    with torch.no_grad(), without_autocast(x.device.type):
        return library_call(_OP, x, weight, bias, *settings, forced_backend())


def _like_x(name: str, tensor: Any, shape: tuple[int, ...], x: torch.Tensor) -> None:
    checks.is_floating(_OP, name, tensor)
    checks.same_device(_OP, name, tensor, "x", x)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{_OP}: {name}: expected shape {shape}, got {tuple(tensor.shape)}; reshape it")
    checks.same_dtype(_OP, name, tensor, "x", x)
