"""Gated linear units after their matrix products: an activation of one half times the other, in one pass each way."""

from typing import Any

import torch

from genai_fast.backends import forced_backend
from genai_fast.kernels.common.channels import wide
from genai_fast.kernels.gated_act.layout import ACTIVATIONS
from genai_fast.ops import checks
from genai_fast.ops.dispatch import KernelFunction, backward_call, library_call
from genai_fast.ops.planned import planned

_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


class _GatedAct(KernelFunction):
    @staticmethod
    def forward(x, up, bias, activation, gate_multiplier, down_multiplier, backend):
        return library_call("gated_act", x, up, bias, activation, gate_multiplier, down_multiplier, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, up, bias, *ctx.settings, ctx.backend = inputs
        ctx.save_for_backward(x, up, bias)

    @staticmethod
    def backward(ctx, grad_y):
        x, up, bias = ctx.saved_tensors
        arguments = (grad_y, x, up, bias, ctx.needs_input_grad[2], *ctx.settings, ctx.backend)
        grad_x, grad_up, grad_bias = backward_call("gated_act_backward", *arguments)
        return dict(x=grad_x, up=grad_up, bias=grad_bias)


def _check_bias(op: str, bias: Any, x: torch.Tensor, columns: int) -> None:
    checks.is_floating(op, "bias", bias)
    checks.same_device(op, "bias", bias, "x", x)
    if bias.shape != (columns,):
        raise ValueError(
            f"{op}: bias: expected shape ({columns},), the gate's half first, got {tuple(bias.shape)}; join two by"
            f" torch.cat"
        )
    if bias.dtype is not x.dtype and (bias.dtype is not torch.float32 or x.dtype is torch.float64):
        raise TypeError(
            f"{op}: bias: expected {x.dtype} or a wider torch.float32 beside x, got {bias.dtype}; convert it with .to()"
        )


def _call(
    op: str, x: Any, up: Any, bias: Any, activation: str, gate_multiplier: Any = 1.0, down_multiplier: Any = 1.0
) -> torch.Tensor:
    checks.is_floating(op, "x", x)
    if x.dim() == 0 or (up is None and x.size(-1) % 2):
        raise ValueError(
            f"{op}: x: expected [..., 2 D], gate and up side by side, got shape {tuple(x.shape)}; pass up by itself"
        )
    if up is not None:
        checks.matches(op, "up", up, "x", x)
        if up.dtype is not x.dtype:  # under autocast
            dtype = torch.promote_types(x.dtype, up.dtype)
            x, up = x.to(dtype), up.to(dtype)
    multipliers = (
        checks.real(op, "gate_multiplier", gate_multiplier, "a finite float"),
        checks.real(op, "down_multiplier", down_multiplier, "a finite float"),
    )
    columns = x.size(-1) // (2 if up is None else 1)
    if bias is not None:
        _check_bias(op, bias, x, 2 * columns)
        bias = wide(bias)
    shape = (*x.shape[:-1], columns)
    if x.dim() != 2:
        x, up = (t if t is None else t.flatten(0, -2) if t.dim() > 2 else t.unsqueeze(0) for t in (x, up))
    y = _GatedAct.call(x, up, bias, activation, *multipliers, forced_backend())
    return y if len(shape) == 2 else y.view(shape)


@planned
def gated_act(
    x: torch.Tensor, up: torch.Tensor | None = None, bias: torch.Tensor | None = None, activation: str = "silu",
    gate_multiplier: float = 1.0, down_multiplier: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """y = down_multiplier * activation(gate_multiplier * (gate + bias[:D])) * (up + bias[D:]).

    The products before it are the model's own: `gated_act(F.linear(h, packed_weight), bias=packed_bias)`, or
    `gated_act(gate_proj(h), up_proj(h))`. Packed, the two gradients come out as one tensor, without a copy.

    Args:
        x: [..., D] the gate, or without up [..., 2 D]: the gate, then up (F.glu has them the other way round).
            float32, bfloat16, float16 or float64, any strides; rows with gaps are read where they lie.
        up: shape and dtype of x, or None.
        bias: [2 D], the gate's half first, or None for 0; the dtype of x, or float32.
        activation: of the gate: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU), "sigmoid" (GLU), "relu" (ReGLU),
            "tanh", or "none" (bilinear).
        gate_multiplier, down_multiplier: finite factors, 1 in most models; Falcon-H1 has others. That model multiplies
            after the next linear layer, which is the same if that one has no bias.

    Returns: y [..., D], dtype of x, contiguous. Under autocast x and up meet in the wider dtype.
    Gradients: x, up and bias, to any order (the second and higher through plain PyTorch; torch.compile refuses those).
        Backward keeps the inputs alone and computes the activation again.
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64). The bias's sums are bitwise repeatable.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Shazeer 2020, arXiv:2002.05202; Dauphin et al. 2017, arXiv:1612.08083.
    """
    checks.one_of("gated_act", "activation", activation, ACTIVATIONS)
    return _call("gated_act", x, up, bias, activation, gate_multiplier, down_multiplier)


@planned
def swiglu(
    x: torch.Tensor, up: torch.Tensor | None = None, bias: torch.Tensor | None = None, gate_multiplier: float = 1.0,
    down_multiplier: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """y = silu(gate + bias[:D]) * (up + bias[D:]), as in Llama's MLP: `gated_act` with "silu".

    Args:
        x, up, bias: as in `gated_act`: swiglu(gate, up), or swiglu(x) with x [..., 2 D].
        gate_multiplier, down_multiplier: as in `gated_act`.

    Returns, Gradients, Backends, Raises, Source: as `gated_act`.
    """
    return _call("swiglu", x, up, bias, "silu", gate_multiplier, down_multiplier)


@planned
def geglu(
    x: torch.Tensor, up: torch.Tensor | None = None, bias: torch.Tensor | None = None, approximate: str = "none"
) -> torch.Tensor:
    """y = gelu(gate + bias[:D]) * (up + bias[D:]): `gated_act` with "gelu" or "gelu_tanh".

    Args:
        x, up, bias: as in `gated_act`.
        approximate: "none" or "tanh", as of F.gelu.

    Returns, Gradients, Backends, Raises, Source: as `gated_act`.
    """
    checks.one_of("geglu", "approximate", approximate, tuple(_GELUS))
    return _call("geglu", x, up, bias, _GELUS[approximate])
