"""Group and instance normalization with activation, residual and per-sample scale and shift: one pass each way."""

from typing import Any

import torch

from genai_fast.backends import forced_backend
from genai_fast.kernels.common.channels import wide
from genai_fast.kernels.group_norm_act import reference
from genai_fast.ops import checks
from genai_fast.ops.dispatch import KernelFunction, beside_input, differentiated_again, library_call
from genai_fast.ops.planned import planned
from genai_fast.precision import autocast_dtype


class _GroupNormAct(KernelFunction):
    @staticmethod
    def forward(x, groups, weight, bias, scale, shift, residual, after, eps, activation, slope, backend):
        return library_call(
            "group_norm_act_forward",
            x,
            groups,
            weight,
            bias,
            scale,
            shift,
            residual,
            after,
            eps,
            activation,
            slope,
            backend,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.groups, *parameters, residual, after, ctx.eps, ctx.activation, ctx.slope, ctx.backend = inputs
        y, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        beside, ctx.from_output = beside_input(None if after else residual, y, ctx.activation, ctx.slope)
        ctx.save_for_backward(x, *parameters, beside, mean, rstd)

    @staticmethod
    def backward(ctx, grad_y, grad_mean, grad_rstd):
        x, weight, bias, scale, shift, beside, mean, rstd = ctx.saved_tensors
        arguments = (grad_y, x, ctx.groups, weight, bias, scale, shift, beside, ctx.from_output)
        settings = (ctx.activation, ctx.slope)
        if differentiated_again():
            results = reference.gradients(*arguments, ctx.eps, *settings)
        else:
            results = library_call("group_norm_act_backward", *arguments, mean, rstd, *settings, ctx.backend)
        grad_x, dz, sum_dz, sum_dz_x_hat = results
        # Added to the result itself, the residual has the result's gradient.
        found = dict(x=grad_x, residual=grad_y if beside is None else dz, shift=sum_dz)
        if ctx.needs_input_grad[4]:  # of scale, which multiplies x-hat weight + bias
            by_weight = sum_dz_x_hat if weight is None else sum_dz_x_hat * weight
            found["scale"] = by_weight if bias is None else by_weight + sum_dz * bias
        modulated = (sum_dz_x_hat, sum_dz) if scale is None else ((1.0 + scale) * s for s in (sum_dz_x_hat, sum_dz))
        for name, needed, sums in zip(("weight", "bias"), ctx.needs_input_grad[2:4], modulated, strict=True):
            if needed:
                found[name] = sums.sum(0)
        return found


@planned
def group_norm_act(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float | None = None,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    residual_after: bool = False,
) -> torch.Tensor:
    """y = activation(n (1 + scale) + shift + residual), n = (x - mean) / sqrt(var + eps) * weight + bias.

    mean and (biased) var are of each sample's groups of C / num_groups neighbouring channels, over all positions.

    Args:
        x: [N, C] or [N, C, ...], float32, bfloat16, float16 or float64, any strides; results keep the layout of a
            contiguous or channels-last x.
        num_groups: divides C; 1 is a layer norm of whole samples, C an instance norm.
        weight, bias: [C] or None for 1 and 0; the dtype of x, or float32.
        eps: added to the variance.
        activation, negative_slope: as in `bias_act`.
        residual: shape and dtype of x, or None for 0.
        residual_after: add it after the activation instead.
        scale, shift: [N, C] or None for 0: of each sample, as conditional norms and diffusion models give them (for
            AdaIN pass its factor less 1); the dtype of x, or float32.

    Returns: y, shape and dtype of x. Under autocast as F.group_norm: float32 on CUDA; on the CPU in the wider dtype
        of x and residual.
    Gradients: x, weight, bias, residual, scale, shift, to any order (the second and higher through plain PyTorch;
        torch.compile refuses those).
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64). Statistics are accurate at any mean, and
        bitwise repeatable.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Wu & He 2018, arXiv:1803.08494.
    """
    given = (weight, bias, eps, activation, negative_slope, residual, scale, shift, residual_after)
    return _call("group_norm_act", x, num_groups, *given)


@planned
def instance_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float | None = None,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    residual_after: bool = False,
) -> torch.Tensor:
    """`group_norm_act` with a group for each channel: mean and (biased) var are over a sample's positions.

    Args, Returns, Gradients, Backends, Raises: as there.
    Source: Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022; scale and shift: Huang & Belongie 2017,
        arXiv:1703.06868.
    """
    op = "instance_norm_act"
    checks.has_channels(op, x)
    given = (weight, bias, eps, activation, negative_slope, residual, scale, shift, residual_after)
    return _call(op, x, x.size(1), *given)


def _call(
    op: str, x: Any, groups: Any, weight: Any, bias: Any, eps: Any, activation: Any, slope: Any, residual: Any,
    scale: Any, shift: Any, after: Any,
) -> torch.Tensor:  # fmt: skip
    checks.has_channels(op, x)
    groups = checks.integer(op, "num_groups", groups, 1)
    if x.size(1) % groups:
        raise ValueError(
            f"{op}: num_groups: expected a divisor of x's {x.size(1)} channels, got {groups}; channels come second"
        )
    if residual is not None:
        checks.matches(op, "residual", residual, "x", x)
    if autocast_dtype(x.device.type) is not None:
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        dtype = torch.promote_types(dtype, torch.float32) if x.is_cuda else dtype
        x, residual = x.to(dtype), residual if residual is None else residual.to(dtype)
    checks.per_channel(op, {"weight": weight, "bias": bias}, x)
    checks.per_sample_channel(op, {"scale": scale, "shift": shift}, x)
    slope, after = checks.activation(op, activation, slope), checks.flag(op, "residual_after", after)
    eps = checks.epsilon(op, eps, ">= 0", 0.0)
    parameters = (wide(p) for p in (weight, bias, scale, shift))
    y, _, _ = _GroupNormAct.call(x, groups, *parameters, residual, after, eps, activation, slope, forced_backend())
    return y
