"""Layer and RMS normalization of a residual sum: one pass forward, one backward, no float atomics."""

from typing import Any

import torch

from genai_fast.backends import forced_backend
from genai_fast.kernels.common.channels import wide
from genai_fast.kernels.layer_norm import reference
from genai_fast.ops import checks
from genai_fast.ops.dispatch import KernelFunction, differentiated_again, library_call
from genai_fast.ops.planned import planned
from genai_fast.precision import autocast_dtype

CASTING_MODES = ("gemma", "llama", "none")


class _LayerNorm(KernelFunction):
    @staticmethod
    def forward(x, residual, weight, bias, rms, eps, casting, backend):
        return library_call("layer_norm", x, residual, weight, bias, rms, eps, casting, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, _, ctx.rms, ctx.eps, ctx.casting, ctx.backend = inputs
        _, h, mean, rstd = output
        ctx.summed = residual is not None
        ctx.save_for_backward(x if residual is None else h, weight, mean, rstd)
        ctx.mark_non_differentiable(*((h, mean, rstd) if residual is None else (mean, rstd)))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_y, grad_h, grad_mean, grad_rstd):
        grad_weight = grad_bias = None
        grad_h = grad_h if ctx.summed else None  # torch.compile makes zeros of what was never returned
        if grad_y is None:
            grad_x = grad_h
        else:
            h, weight, mean, rstd = ctx.saved_tensors
            wanted = ctx.needs_input_grad[2:4]
            if differentiated_again():
                results = reference.gradients(grad_y, grad_h, h, weight, *wanted, ctx.rms, ctx.eps, ctx.casting)
            else:
                arguments = (grad_y, grad_h, h, weight, mean, rstd, *wanted, ctx.rms, ctx.casting)
                results = library_call("layer_norm_backward", *arguments, ctx.backend)
            grad_x, grad_weight, grad_bias = results
        return dict(x=grad_x, residual=grad_x, weight=grad_weight, bias=grad_bias)


def _call(
    op: str, x: Any, weight: Any, bias: Any, eps: Any, residual: Any, rms: bool, offset: Any = 0.0,
    casting: str = "gemma",
) -> Any:  # fmt: skip
    checks.is_floating(op, "x", x)
    if x.dim() == 0 or x.size(-1) == 0:
        raise ValueError(
            f"{op}: x: expected [..., D] with D > 0, got shape {tuple(x.shape)}; the last dimension is normalized"
        )
    if residual is not None:
        checks.matches(op, "residual", residual, "x", x)
    if autocast_dtype(x.device.type) is not None:
        x, residual = _autocast(x, residual)
    checks.per_column(op, {"weight": weight, "bias": bias}, x)
    if rms and eps is None:
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    eps = checks.real(op, "eps", eps, "a finite float >= 0", 0.0)
    weight = wide(weight)
    if offset != 0.0:
        weight = weight + checks.real(op, "offset", offset, "a finite float")
        weight = wide(weight.to(x.dtype)) if casting == "none" else weight
    y, h, _, _ = _LayerNorm.call(x, residual, weight, wide(bias), rms, eps, casting, forced_backend())
    return y if residual is None else (y, h)


def _autocast(x, residual):
    """As x + residual and F.layer_norm: in the wider dtype of the two, on CUDA in float32 at least."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = torch.promote_types(dtype, torch.float32) if x.is_cuda else dtype
    return x.to(dtype), residual if residual is None else residual.to(dtype)


@planned
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = (h - mean) / sqrt(var + eps) * weight + bias, h = x + residual; mean and var over the last dimension.

    With a residual h is returned too, for a block that carries it on: `y, h = layer_norm(branch, w, b, residual=h)`.

    Args:
        x: [..., D], float32, bfloat16, float16 or float64, any strides (rows with gaps are read where they lie).
        weight, bias: [D] or None for 1 and 0; the dtype of x, or float32.
        eps: added to the (biased) variance.
        residual: shape and dtype of x, or None for 0.

    Returns: y, shape and dtype of x, contiguous; with a residual (y, h), h rounded to that dtype before it is
        normalized. Under autocast as F.layer_norm: all is float32 on CUDA; on the CPU x and residual meet in the wider
        dtype.
    Gradients: x, residual, weight, bias, to any order (the second and higher through plain PyTorch; torch.compile
        refuses those). h's own gradient is added in the same pass.
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64). Statistics are accurate at any mean; sums
        over rows are bitwise repeatable.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
    """
    return _call("layer_norm", x, weight, bias, eps, residual, False)


@planned
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
    casting_mode: str = "gemma",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = h / sqrt(mean(h^2) + eps) * (offset + weight), h = x + residual; the mean over the last dimension.

    With a residual h is returned too, as by `layer_norm`.

    Args:
        x: [..., D], float32, bfloat16, float16 or float64, any strides.
        weight: [D] or None for 1; the dtype of x, or float32.
        eps: added to the mean square; None: that of float32's (float64's) precision, 1.2e-7, as F.rms_norm.
        residual: shape and dtype of x, or None for 0.
        offset: added to the weight, in float32: 1 in Gemma, whose weights are learned as deviations from 1.
        casting_mode: where bfloat16 and float16 are rounded. "gemma": y alone, from float32. "llama": before the
            product with the weight too, as Llama's norm. "none": each step, offset + weight and the mean square among
            them, as plain PyTorch in that dtype; its mean of squares is summed in float32. Gradients take a rounding
            for the identity.

    No argument writes the gradient over its upstream one, as Liger-Kernel's in_place does: others may read that.

    Returns, Gradients, Backends, Raises: as `layer_norm`.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    if weight is None and offset != 0.0:
        raise ValueError(f"rms_norm: offset: expected 0 without a weight, got {offset!r}; it is added to the weight")
    checks.one_of("rms_norm", "casting_mode", casting_mode, CASTING_MODES)
    return _call("rms_norm", x, weight, None, eps, residual, True, offset, casting_mode)
