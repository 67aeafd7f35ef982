"""Convolution, batch norm with running statistics and activation as one oneDNN call on the CPU.

The norm is folded into weight and bias at every call. It costs a pass over the weight, which is small beside the output
or the fold is not taken; and nothing is kept that an optimizer, a loaded checkpoint or `p.data` could make stale.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.fusion import thresholds
from genai_fast.fusion.chains import CONVS, TRANSPOSED
from genai_fast.kernels.common import onednn
from genai_fast.kernels.common.activations import activate

_NAMES = {"none": "none", "leaky_relu": "leaky_relu", "tanh": "tanh", "silu": "swish"}
_PLAIN = (torch.Tensor, nn.Parameter)


@functools.cache
def _available(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the operators, which are Inductor's own, for this dtype."""
    names = ("_convolution_pointwise", "_convolution_transpose_pointwise")
    return (
        dtype in (torch.float32, torch.bfloat16)
        and onednn.serves(dtype)
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
    )


def _output_elements(conv: nn.Module, x: torch.Tensor) -> int:
    sizes = []
    for k, length in enumerate(x.shape[2:]):
        reach = conv.dilation[k] * (conv.kernel_size[k] - 1)
        if type(conv) in TRANSPOSED:
            sizes.append((length - 1) * conv.stride[k] - 2 * conv.padding[k] + reach + conv.output_padding[k] + 1)
        else:
            sizes.append((length + 2 * conv.padding[k] - reach - 1) // conv.stride[k] + 1)
    return x.size(0) * conv.out_channels * math.prod(max(size, 0) for size in sizes)


def folds(conv: nn.Module, norm: nn.Module, x: torch.Tensor) -> bool:
    """Whether the fold computes the same, has a gain, and no gradient is asked for."""
    if norm.training or type(conv) not in CONVS + TRANSPOSED or not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    tensors = (x, conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if any(t is not None and (type(t) not in _PLAIN or not t.is_cpu) for t in tensors):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    mean, var, weight = norm.running_mean, norm.running_var, conv.weight
    if mean is None or var is None or weight.dtype is not x.dtype or x.dim() != weight.dim():
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if any(more >= step for more, step in zip(conv.output_padding, conv.stride, strict=True)):
        return False  # with dilation torch takes these, oneDNN does not
    if x.size(1) != conv.in_channels or mean.numel() != conv.out_channels:
        return False  # torch's own error comes from the modules
    if not (_available(x.dtype) and torch.backends.mkldnn.enabled):
        return False
    return _output_elements(conv, x) >= max(thresholds.FOLD, weight.numel() * 4)


@torch.no_grad()
def scaled(conv: nn.Module, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the convolution that is norm(conv(x)) in evaluation."""
    scale = torch.rsqrt(norm.running_var.float() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    weight, ones = conv.weight, (1,) * (conv.weight.dim() - 2)
    if type(conv) in TRANSPOSED:  # [in, out / groups, ...]: input channels are cut into groups, each with its outputs
        groups = weight.unflatten(0, (conv.groups, -1))
        weight = (groups * scale.view(conv.groups, 1, -1, *ones)).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, 1, *ones)
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)


@torch.no_grad()
def folded(conv: nn.Module, norm: nn.Module, x: torch.Tensor, activation: str, slope: float) -> torch.Tensor:
    """activation(norm(conv(x))) where `folds` says so."""
    norm._check_input_dim(x)
    weight, bias = scaled(conv, norm)
    # oneDNN's relu turns NaN into 0, and that is what its leaky_relu of slope 0 is; its sigmoid sometimes into 1.
    after = activation not in _NAMES or (activation == "leaky_relu" and slope == 0.0)
    name = "none" if after else _NAMES[activation]
    epilogue = (name, [slope] if name == "leaky_relu" else [], "")
    given = (x, weight, bias, conv.padding)
    settings = (conv.stride, conv.dilation, conv.groups, *epilogue)
    if type(conv) in TRANSPOSED:
        y = torch.ops.mkldnn._convolution_transpose_pointwise(*given, conv.output_padding, *settings)
    else:
        y = torch.ops.mkldnn._convolution_pointwise(*given, *settings)
    if not after:
        return y
    if activation == "sigmoid":
        return y.sigmoid_()
    if activation in ("gelu", "gelu_tanh"):
        return activate(y, activation, slope)
    return y.relu_() if activation == "relu" else F.leaky_relu_(y, slope)
