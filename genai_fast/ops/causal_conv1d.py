"""Causal convolution along a sequence with its bias, condition and gate in one pass; dense, or one filter a channel."""

from typing import Any

import torch

from genai_fast.backends import forced_backend
from genai_fast.kernels.causal_conv1d import reference
from genai_fast.kernels.causal_conv1d.layout import ACTIVATIONS, GATED
from genai_fast.kernels.common.channels import wide
from genai_fast.ops import checks
from genai_fast.ops.conv_transpose import cast
from genai_fast.ops.dispatch import KernelFunction, backward_call, differentiated_again, library_call, needs_graph
from genai_fast.ops.planned import planned
from genai_fast.precision import autocast_dtype


class _Dense(KernelFunction):
    @staticmethod
    def forward(x, weight, bias, condition, dilation, activation, keep, backend):
        return library_call("causal_conv1d", x, weight, bias, condition, dilation, activation, keep, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, condition, ctx.dilation, ctx.activation, keep, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, bias, condition, output[1] if keep else None)

    @staticmethod
    def backward(ctx, grad_y, _):
        x, weight, bias, condition, z = ctx.saved_tensors
        _, _, needs_bias, needs_condition, *_ = ctx.needs_input_grad
        grad_z, grad_bias = grad_y, None
        if ctx.activation != "none":
            if differentiated_again():  # again: the saved one carries no graph
                z = reference.causal_conv1d(x, weight, bias, condition, ctx.dilation, "none", True)[1]
            if ctx.activation == GATED:
                arguments = (grad_y, z, needs_bias, ctx.backend)
                grad_z, grad_bias = backward_call("causal_conv1d_gate_backward", *arguments)
            else:
                arguments = (grad_y.mT, z.mT, None, None, False, needs_bias, ctx.activation, 0.0, ctx.backend)
                grad_z, grad_bias, _ = backward_call("bias_act_backward", *arguments)
                grad_z = grad_z.mT
        elif needs_bias:
            grad_bias = grad_z.sum((0, 1), dtype=wide(grad_z[:0]).dtype)
        found = {"bias": grad_bias}
        if ctx.needs_input_grad[0]:
            found["x"] = backward_call("causal_conv1d_grad_input", grad_z, weight, ctx.dilation, ctx.backend)
        if ctx.needs_input_grad[1]:
            arguments = (grad_z, x, weight.size(2), ctx.dilation, ctx.backend)
            found["weight"] = backward_call("causal_conv1d_grad_weight", *arguments)
        if needs_condition:
            of_sample = condition.dim() == 2
            found["condition"] = wide(grad_z).sum(1).to(grad_z.dtype) if of_sample else grad_z
        return found


class _Depthwise(KernelFunction):
    @staticmethod
    def forward(x, weight, bias, dilation, activation, backend):
        return library_call("depthwise_causal_conv1d", x, weight, bias, dilation, activation, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.dilation, ctx.activation, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, bias = ctx.saved_tensors
        arguments = (grad_y, x, weight, bias, ctx.dilation, ctx.activation, ctx.backend)
        grad_x, grad_weight, grad_bias = backward_call("depthwise_causal_conv1d_backward", *arguments)
        return dict(x=grad_x, weight=grad_weight.to(weight.dtype), bias=grad_bias)


@planned
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    condition: torch.Tensor | None = None,
    dilation: int = 1,
    activation: str = "none",
) -> torch.Tensor:
    """y = activation(conv1d(pad(x), weight) + bias + condition), in which y[..., l] depends on x up to position l.

    z[n, co, l] = sum over ci and k of x[n, ci, l - (K - 1 - k) dilation] weight[co, ci, k], where x before its first
    position is 0: F.conv1d(F.pad(x, ((K - 1) * dilation, 0)), weight, bias, dilation=dilation).

    Args:
        x: [N, C, L], float32, bfloat16, float16 or float64, any strides; channels last in memory needs no copy.
        weight: [C_out, C, K] as nn.Conv1d's, dtype of x.
        bias: [C_out] or None for 0; the dtype of x, or float32.
        condition: what is added to z: [N, C_out], the same at all positions, or [N, C_out, L]; dtype of x.
        dilation: positions from one tap to the next, at least 1.
        activation: "none"; "silu"; or "gated_tanh": tanh of the first half of z's channels times the sigmoid of the
            second.

    Returns: y [N, C_out, L], of "gated_tanh" [N, C_out / 2, L]; dtype of x, channels last in memory ([N, L, C]).
        Under autocast x, weight and condition are cast, as with PyTorch's convolutions.
    Gradients: x, weight, bias and condition, to any order (the second and higher through plain PyTorch; torch.compile
        refuses those). With an activation z is kept for them.
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64). On CUDA float32 is multiplied in TF32 where
        torch.backends.cudnn.conv allows it. Bitwise repeatable.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: van den Oord et al. 2016 (WaveNet), arXiv:1609.03499.
    """
    op = "causal_conv1d"
    dilation = checks.integer(op, "dilation", dilation, 1)
    checks.one_of(op, "activation", activation, ACTIVATIONS)
    _shapes(op, x, weight)
    if weight.size(1) != x.size(1):
        raise ValueError(
            f"{op}: weight: expected {x.size(1)} as second size, for as many channels of x, got {tuple(weight.shape)};"
            f" a filter for each channel goes to depthwise_causal_conv1d"
        )
    channels = weight.size(0)
    if activation == GATED and channels % 2:
        raise ValueError(f"{op}: weight: expected an even number of channels for {GATED!r}, got {channels}")
    x, weight = cast(op, x, weight)
    checks.per_channel(op, {"bias": bias}, x, channels)
    if condition is not None:
        condition = _condition(op, condition, x, channels)
    bias = wide(bias)
    keep = activation != "none" and needs_graph((x, weight, bias, condition))
    return _Dense.call(x.mT, weight, bias, condition, dilation, activation, keep, forced_backend())[0].mT


@planned
def depthwise_causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dilation: int = 1, activation: str = "none"
) -> torch.Tensor:
    """y[n, c, l] = activation(sum over k of x[n, c, l - (K - 1 - k) dilation] weight[c, 0, k] + bias[c]).

    What comes before the first position is 0: F.conv1d(F.pad(x, ((K - 1) * dilation, 0)), weight, bias, groups=C), as
    before the state-space layer of Mamba.

    Args:
        x: [N, C, L], float32, bfloat16, float16 or float64, any strides; channels last in memory, also a part of the
            channels of a wider tensor, needs no copy.
        weight: [C, 1, K] as nn.Conv1d's with groups=C, dtype of x.
        bias: [C] or None for 0; the dtype of x, or float32.
        dilation: positions from one tap to the next, at least 1.
        activation: "none" or "silu".

    Returns: y [N, C, L], dtype of x, channels last in memory. Under autocast x and weight are cast, as with PyTorch's
        convolutions.
    Gradients: x, weight and bias, to any order, as of `causal_conv1d`. Backward keeps the inputs alone.
    Backends: C++ (CPU) and Triton (CUDA) for K up to 4; reference (longer kernels, elsewhere, and float64). Bitwise
        repeatable.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Gu & Dao 2023 (Mamba), arXiv:2312.00752.
    """
    op = "depthwise_causal_conv1d"
    dilation = checks.integer(op, "dilation", dilation, 1)
    checks.one_of(op, "activation", activation, ACTIVATIONS[:-1])
    _shapes(op, x, weight)
    if tuple(weight.shape[:2]) != (x.size(1), 1):
        raise ValueError(
            f"{op}: weight: expected [{x.size(1)}, 1, K], a filter for each channel of x, got {tuple(weight.shape)};"
            f" one of all channels goes to causal_conv1d"
        )
    x, weight = cast(op, x, weight)
    checks.per_channel(op, {"bias": bias}, x)
    return _Depthwise.call(x.mT, weight.squeeze(1), wide(bias), dilation, activation, forced_backend()).mT


def _shapes(op: str, x: Any, weight: Any) -> None:
    """x is [N, C, L] and the weight has three dimensions, of at least 1 each but for the batch, on one device."""
    checks.is_floating(op, "x", x)
    checks.is_floating(op, "weight", weight)
    if x.dim() != 3:
        raise ValueError(f"{op}: x: expected [N, C, L], got shape {tuple(x.shape)}; add a batch with .unsqueeze(0)")
    if weight.dim() != 3:
        raise ValueError(f"{op}: weight: expected three dimensions as nn.Conv1d's, got shape {tuple(weight.shape)}")
    checks.same_device(op, "weight", weight, "x", x)
    if min(*x.shape[1:], *weight.shape) < 1:
        raise ValueError(
            f"{op}: x and weight: expected sizes of at least 1 except for the batch, got {tuple(x.shape)} and"
            f" {tuple(weight.shape)}"
        )


def _condition(op: str, condition: Any, x: torch.Tensor, channels: int) -> torch.Tensor:
    """[N, C_out], or [N, L, C_out], in x's dtype."""
    checks.is_floating(op, "condition", condition)
    checks.same_device(op, "condition", condition, "x", x)
    of_sample, of_position = (x.size(0), channels), (x.size(0), channels, x.size(2))
    if tuple(condition.shape) not in (of_sample, of_position):
        raise ValueError(
            f"{op}: condition: expected shape {of_sample} or {of_position}, got {tuple(condition.shape)}; it is added"
            f" to the convolution's channels"
        )
    if condition.dtype is not x.dtype:
        if autocast_dtype(x.device.type) is None:
            checks.same_dtype(op, "condition", condition, "x", x)
        condition = condition.to(x.dtype)
    return condition if condition.dim() == 2 else condition.mT
