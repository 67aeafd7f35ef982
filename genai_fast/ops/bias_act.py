"""A bias by channel and an activation in one pass, and their gradients in one more; GELU with a bias by the same."""

import torch
import torch.nn.functional as F

from genai_fast.backends import forced_backend
from genai_fast.kernels.common.channels import wide
from genai_fast.ops import checks
from genai_fast.ops.dispatch import KernelFunction, backward_call, library_call
from genai_fast.ops.planned import planned

_OP = "bias_act"


class _BiasAct(KernelFunction):
    @staticmethod
    def forward(x, bias, slopes, activation, slope, from_output, backend):
        return library_call("bias_act", x, bias, slopes, activation, slope, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, bias, slopes, *ctx.settings, ctx.from_output, ctx.backend = inputs
        if ctx.settings[0] == "none":
            ctx.save_for_backward(None, None, None)
        else:
            ctx.save_for_backward(*((output, None) if ctx.from_output else (x, bias)), slopes)

    @staticmethod
    def backward(ctx, grad_y):
        saved, bias, slopes = ctx.saved_tensors
        saved = grad_y if saved is None else saved  # of an activation whose derivative is 1
        arguments = (grad_y, saved, bias, slopes, ctx.from_output, ctx.needs_input_grad[1], *ctx.settings, ctx.backend)
        grad_x, grad_bias, grad_slopes = backward_call("bias_act_backward", *arguments)
        return dict(x=grad_x, bias=grad_bias, slopes=grad_slopes)


@planned
def bias_act(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "leaky_relu",
    negative_slope: float | None = None,
    *,
    save_output: bool = False,
    act_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = activation(x + bias[c]).

    Args:
        x: [N, C] or [N, C, ...], float32, bfloat16, float16 or float64, any strides; results keep the layout of a
            contiguous or channels-last x.
        bias: [C] or None for 0; the dtype of x, or float32.
        activation: "none", "relu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "elu", "relu6",
            "selu", "hardswish", "softplus" (of threshold 20), "mish" or "prelu": PyTorch's functions of these names.
        negative_slope: of leaky_relu; alpha of elu; beta of softplus. None: 0.2, 1 and 1.
        save_output: keep y for backward instead of x, as an activation in place does, so that x can be freed. y must
            then stay as it is until backward: autograd refuses one that was changed in place. relu, tanh and sigmoid
            always keep y; leaky_relu can where its slope is above 0; the others cannot.
        act_weight: of prelu, its slopes: [1] for all channels or [C]; the dtype of x, or float32.

    Returns: y, shape and dtype of x.
    Gradients: x, bias and act_weight, to any order (the second and higher through plain PyTorch; torch.compile refuses
        those).
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64). The sums by channel are bitwise repeatable.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Maas, Hannun & Ng 2013 (leaky ReLU); He et al. 2015, arXiv:1502.01852 (PReLU).
    """
    return _call(_OP, x, bias, activation, negative_slope, save_output, act_weight)


def _call(op, x, bias, activation, slope, save_output, act_weight=None):
    checks.has_channels(op, x)
    checks.per_channel(op, {"bias": bias}, x)
    slope, slopes = checks.activation_with_weight(op, x, activation, slope, act_weight)
    from_output = checks.saves_output(op, activation, slope, save_output, ("relu", "tanh", "sigmoid"))
    if bias is not None and slopes is not None:
        slopes = slopes.expand(x.size(1))
    return _BiasAct.call(x, wide(bias), wide(slopes), activation, slope, from_output, forced_backend())


@planned
def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None, approximate: str = "none") -> torch.Tensor:
    """y = gelu(x + bias), the bias along the last dimension: `bias_act` of x's rows with "gelu" or "gelu_tanh".

    The product before it is the model's own: `bias_gelu(F.linear(h, weight), bias)`.

    Args:
        x: [..., D], float32, bfloat16, float16 or float64, any strides.
        bias: [D] or None for 0; the dtype of x, or float32.
        approximate: "none" or "tanh", as of F.gelu. "none" is relatively accurate far into the negative tail too.
            Without a bias it is F.gelu on the CPU, which is faster there, unless use_backend asks for a kernel.

    Returns: y, shape and dtype of x, contiguous.
    Gradients, Backends, Raises: as `bias_act`. Backward keeps x alone.
    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415.
    """
    op = "bias_gelu"
    checks.is_floating(op, "x", x)
    checks.one_of(op, "approximate", approximate, ("none", "tanh"))
    if x.dim() == 0:
        raise ValueError(f"{op}: x: expected [..., D], got shape (); add a dimension with .unsqueeze(0)")
    if isinstance(bias, torch.Tensor) and bias.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: bias: expected shape {tuple(x.shape[-1:])} as x has in its last dimension, got {tuple(bias.shape)}"
        )
    if bias is None and approximate == "none" and x.is_cpu and not forced_backend():
        return F.gelu(x.contiguous())
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    y = _call(op, rows, bias, "gelu" if approximate == "none" else "gelu_tanh", 0.0, False)
    return y.view(x.shape)
