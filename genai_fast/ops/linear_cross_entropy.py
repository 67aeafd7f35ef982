"""The cross-entropy of a linear layer's logits, which never exist as a whole."""

from typing import Any

import torch

from genai_fast.backends import forced_backend, survey
from genai_fast.kernels.cross_entropy import reference
from genai_fast.kernels.cross_entropy.linear import default_chunk
from genai_fast.kernels.cross_entropy.targets import count_of, probabilities
from genai_fast.ops import checks
from genai_fast.ops.cross_entropy import (
    _CrossEntropy,
    at_least_one_class,
    check_targets,
    outputs_of,
    settings_of,
    wanted_of,
    weights_of,
)
from genai_fast.ops.dispatch import KernelFunction, differentiated_again, library_call, observed
from genai_fast.precision import autocast_dtype

_LINEAR = "linear_cross_entropy"


class _LinearCrossEntropy(KernelFunction):
    """Gradients of the sum over rows are made in forward, chunk by chunk, and scaled in backward.

    To make them in backward instead would cost the first of the three matrix products twice. Those of the single
    losses (reduction "none") cannot be had before their upstream gradients are, so these pay that.
    """

    @staticmethod
    def forward(
        x, weight, bias, target, class_weight, ignore_index, label_smoothing, z_loss, softcap, scaled, reduction,
        predict, chunk, of_x, of_weight, of_bias, backend,
    ):  # fmt: skip
        settings = (ignore_index, label_smoothing, z_loss, softcap, scaled, reduction)
        rest = (predict, chunk, of_x, of_weight, of_bias, backend)
        return library_call(_LINEAR, x, weight, bias, target, None, class_weight, *settings, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, target, class_weight, *ctx.settings, _, ctx.chunk, _, _, _, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, bias, target, class_weight, *output[1:4])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return {}
        x, weight, bias, target, class_weight, *made = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        reduction = ctx.settings[-1]
        if differentiated_again():
            grads = _differentiable(grad_loss, x, weight, bias, target, class_weight, ctx.settings, needed)
        elif reduction == "none":
            arguments = (x, weight, bias, target, grad_loss, class_weight, *ctx.settings, False, ctx.chunk, *needed)
            _, *grads = library_call(_LINEAR, *arguments, ctx.backend)[:4]
        else:
            if reduction == "mean":  # where no target counts, all gradients are 0
                parts, number = count_of(target, class_weight, ctx.settings[0], grad_loss.dtype, "mean")
                grad_loss = grad_loss / torch.where(number > 0, parts, 1.0)
            grads = _scaled(made, grad_loss)
        of = {"x": x, "weight": weight, "bias": bias}.items()
        return {n: g.to(p.dtype) for g, (n, p), wanted in zip(grads, of, needed, strict=True) if wanted}


def counted(node: Any) -> torch.Tensor | None:
    """Over how many targets one of these ops, the node of a graph, is a mean; None: another node or reduction."""
    function = getattr(node, "_forward_cls", None)
    if function not in (_CrossEntropy, _LinearCrossEntropy) or node.settings[-1] != "mean":
        return None
    if function is _CrossEntropy:
        return node.saved_tensors[3][0]
    _, _, _, target, class_weight, *_ = node.saved_tensors
    return count_of(target, class_weight, node.settings[0], torch.float32, "mean")[0]


def is_sum(node: Any) -> bool:
    """Whether a graph's node is one of these ops, summed."""
    return getattr(node, "_forward_cls", None) in (_CrossEntropy, _LinearCrossEntropy) and node.settings[-1] == "sum"


def _scaled(made, grad_loss):
    """What forward made times the upstream gradient: over it if the graph goes, since that is as large as weight."""
    kept = observed() or survey((grad_loss,))[2] or torch._C._autograd._get_current_graph_task_keep_graph()
    # A second backward of a graph that is kept must find them as they are. An alias, so that it can become .grad.
    return [g * grad_loss if kept else g.mul_(grad_loss).detach() for g in made]


def _differentiable(grad_loss, x, weight, bias, target, class_weight, settings, needed):
    """Gradients of x, weight and bias in plain PyTorch, by the logits as a whole."""
    logits = torch.nn.functional.linear(x, weight, bias)
    ignore_index, label_smoothing, z_loss, softcap, scaled, reduction = settings
    count = count_of(target, class_weight, ignore_index, grad_loss.dtype, reduction)
    more = (class_weight, ignore_index, label_smoothing, z_loss, softcap)
    if scaled:
        with torch.no_grad():
            lse = reference.cross_entropy(logits, target, *more, "none", False)[1]
            factors = probabilities(logits, target, lse, softcap, ignore_index)
        grad_loss = grad_loss * factors
    grad = reference.cross_entropy_backward(grad_loss, logits, target, None, count, *more, reduction)
    return grad @ weight, grad.t() @ x, grad.sum(0) if needed[2] else None


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunk: int | None = None,
    class_weight: torch.Tensor | None = None,
    softcap: float | None = None,
    token_scaling: bool = False,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Any:
    """`cross_entropy` of x weight^T + bias, by chunks of rows: the logits [..., V] are never whole in memory.

    The gradients of the sum over rows are made in forward, while a chunk's logits are there, and multiplied by the
    upstream gradient in backward; with reduction "none" they are made in backward, which costs one more matrix product.
    Worth it where the logits are what fills the memory; where they fit, `cross_entropy(F.linear(...))` is as fast.

    Args:
        x: [..., D], float32, bfloat16, float16 or float64.
        weight: [V, D], x's dtype (any floating-point dtypes under autocast, which casts x, weight and bias).
        target, ignore_index, label_smoothing, z_loss, reduction, class_weight, softcap: as of `cross_entropy`.
        bias: [V] or None.
        chunk: rows at a time; by default as many as make 64 MiB of logits on the CPU, 256 MiB on CUDA.
        token_scaling: multiply each position's loss by the probability of its target, as a factor without a gradient.
        return_z_loss, return_token_accuracy, return_predicted_tokens: return a `CrossEntropyOutput` with these.

    Returns: The loss, as `cross_entropy` gives it; `CrossEntropyOutput` if more is asked for.
    Gradients: x, weight and bias, to any order (the second and higher through plain PyTorch with whole logits;
        torch.compile refuses those). Those of weight and bias are summed over chunks in float32.
    Backends: matrix products by PyTorch; the rest C++ (CPU), Triton (CUDA), reference (elsewhere, and float64).
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated; of targets as
        `cross_entropy`.
    Source: Wijmans et al. 2024, arXiv:2411.09009; Hsu et al. 2024, arXiv:2410.10989.
    """
    checks.is_floating(_LINEAR, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{_LINEAR}: x: expected [..., D], got shape (); pass vectors")
    _partner("weight", weight, x)
    if weight.dim() != 2 or weight.size(1) != x.size(-1):
        raise ValueError(
            f"{_LINEAR}: weight: expected [V, {x.size(-1)}] as x has, got shape {tuple(weight.shape)};"
            f" pass torch.nn.Linear's weight"
        )
    classes = weight.size(0)
    at_least_one_class(_LINEAR, "weight", weight, classes)
    if bias is not None:
        _partner("bias", bias, x)
        if bias.shape != (classes,):
            raise ValueError(
                f"{_LINEAR}: bias: expected shape ({classes},) as weight gives {classes} classes, got"
                f" {tuple(bias.shape)}"
            )
    *settings, _ = settings_of(_LINEAR, ignore_index, label_smoothing, z_loss, softcap, reduction)
    scaled = checks.flag(_LINEAR, "token_scaling", token_scaling)
    outputs = wanted_of(_LINEAR, return_z_loss, return_token_accuracy, return_predicted_tokens)
    check_targets(_LINEAR, target, x.shape[:-1], "x", x, classes, ignore_index)
    class_weight = weights_of(_LINEAR, class_weight, x, classes)
    if chunk is not None:
        (chunk,) = checks.sizes(_LINEAR, "chunk", chunk, 1, 1)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype is not torch.float64:
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    rows, t = x.reshape(target.numel(), x.size(-1)), target.reshape(-1)
    if chunk is None:
        chunk = default_chunk(classes, x.element_size(), x.device.type)
    # Whose gradients to make in forward.
    wanted: tuple[Any, ...] = (rows, weight, bias) if reduction != "none" and torch.is_grad_enabled() else (None,) * 3
    needed = [p is not None and p.requires_grad for p in wanted]
    arguments = (rows, weight, bias, t, class_weight, *settings, scaled, reduction, any(outputs[1:]), chunk, *needed)
    loss, *_, penalty, predicted = _LinearCrossEntropy.call(*arguments, forced_backend())
    loss = loss.view(target.shape) if reduction == "none" else loss
    if not any(outputs):
        return loss
    penalty = penalty if penalty.numel() else loss.new_zeros(target.shape)
    return outputs_of(loss, penalty, predicted, target, (*settings, reduction), outputs)


def _partner(name: str, p: Any, x: torch.Tensor) -> None:
    """A tensor of x's device, and of its dtype unless autocast casts them."""
    checks.is_floating(_LINEAR, name, p)
    checks.same_device(_LINEAR, name, p, "x", x)
    if autocast_dtype(x.device.type) is None:
        checks.same_dtype(_LINEAR, name, p, "x", x)
