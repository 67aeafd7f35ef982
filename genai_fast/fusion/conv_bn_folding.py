"""Convolution, batch norm with running statistics and activation as one oneDNN call on the CPU.

The norm is folded into weight and bias at every call. It costs a pass over the weight, which is small compared with the
output, or the fold is not taken; and nothing is kept that an optimizer, a loaded checkpoint or `p.data` could make
stale.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format

from genai_fast.fusion import thresholds
from genai_fast.fusion.operands import Chain, Convolution, Norm, needs_gradient, tensors_are_plain
from genai_fast.kernels.common import onednn
from genai_fast.kernels.common.activations import activate
from genai_fast.precision import autocast_dtype

_NAMES = {"none": "none", "leaky_relu": "leaky_relu", "tanh": "tanh", "silu": "swish"}
# In place on oneDNN's result.
_AFTER: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "relu": lambda y, slope: y.relu_(), "sigmoid": lambda y, slope: y.sigmoid_(), "leaky_relu": F.leaky_relu_,
    "elu": F.elu_, "selu": lambda y, slope: torch.selu_(y), "relu6": lambda y, slope: F.relu6(y, inplace=True),
    "hardswish": lambda y, slope: F.hardswish(y, inplace=True), "mish": lambda y, slope: F.mish(y, inplace=True),
}  # fmt: skip


@functools.cache
def _available(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the operators, which are Inductor's own, for this dtype."""
    names = ("_convolution_pointwise", "_convolution_transpose_pointwise")
    return (
        dtype in (torch.float32, torch.bfloat16)
        and onednn.serves(dtype)
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
    )


def why_not(chain: Chain, x: torch.Tensor) -> str:
    """Why the fold does not compute the same here, or has no gain; "" if it does."""
    conv, norm = chain.conv, chain.norm
    if norm is None:
        return "there is no batch norm"
    tensors = (x, conv.weight, conv.bias, *norm.tensors, chain.activation.weight)
    if norm.training or norm.mean is None or norm.var is None:
        return "the norm takes the batch's statistics"
    if not all(t is None or t.is_cpu for t in tensors) or autocast_dtype("cpu"):
        return "autocast is on" if x.is_cpu else "it is for CPU tensors"
    if not tensors_are_plain(*tensors):
        return "a parameter is of a tensor subclass"
    if needs_gradient(*tensors):
        return "gradients are needed"
    if conv.weight.dtype is not x.dtype or x.dim() != conv.weight.dim():
        return "input and weight differ in dtype or dimensions"
    if reason := norm.why_refused(x):
        return reason
    if x.dim() == 5:  # in channels_last_3d oneDNN's result lies otherwise than PyTorch's of the weight or such a kernel
        last, weight_last = (suggest_memory_format(t) is torch.channels_last_3d for t in (x, conv.weight))
        if (weight_last and not last) or (last and math.prod(conv.kernel) == 1):
            return "input or weight is in channels_last_3d"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r} of mode {conv.padding_mode}"
    if any(more >= step for more, step in zip(conv.output_padding, conv.stride, strict=True)):
        return "the output padding is not below the stride"  # with dilation torch takes these, oneDNN does not
    if (x.size(1), norm.mean.numel()) != conv.channels:
        return "the channels do not match"  # torch's own error comes from the modules
    if not (_available(x.dtype) and torch.backends.mkldnn.enabled):
        return f"oneDNN does not serve {x.dtype} here"
    return thresholds.fold(x.size(0) * conv.channels[1] * math.prod(conv.output_plane(x)), conv.weight)


@torch.no_grad()
def folded(conv: Convolution, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the convolution that is norm(conv(x)) in evaluation."""
    scale = torch.rsqrt(norm.var.float() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = (-norm.mean if conv.bias is None else conv.bias - norm.mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    weight, ones = conv.weight, (1,) * (conv.weight.dim() - 2)
    if conv.transposed:  # [in, out / groups, ...]: input channels are cut into groups, each with its outputs
        groups = weight.unflatten(0, (conv.groups, -1))
        weight = (groups * scale.view(conv.groups, 1, -1, *ones)).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, 1, *ones)
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)


@torch.no_grad()
def run(chain: Chain, x: torch.Tensor) -> torch.Tensor:
    """activation(norm(conv(x))), if there is no reason why not."""
    conv, norm, activation, slope = chain.conv, chain.norm, chain.activation.name, chain.activation.slope
    if norm.module is not None:
        norm.module._check_input_dim(x)
    weight, bias = folded(conv, norm)
    # oneDNN's relu turns NaN into 0, and that is what its leaky_relu of slope 0 is; its sigmoid sometimes into 1.
    after = activation not in _NAMES or (activation == "leaky_relu" and slope == 0.0)
    name = "none" if after else _NAMES[activation]
    given = (x, weight, bias, conv.padding)
    settings = (conv.stride, conv.dilation, conv.groups, name, [slope] if name == "leaky_relu" else [], "")
    if conv.transposed:
        y = torch.ops.mkldnn._convolution_transpose_pointwise(*given, conv.output_padding, *settings)
    else:
        y = torch.ops.mkldnn._convolution_pointwise(*given, *settings)
    if not after:
        return y
    if activation == "prelu":
        return chain.activation(y)
    return _AFTER[activation](y, slope) if activation in _AFTER else activate(y, activation, slope)
