"""The cross-entropy of logits in one pass each way: smoothed, weighted by class, of capped logits, with a z-loss."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from genai_fast.backends import forced_backend, select, survey
from genai_fast.kernels.common.schema import wide_dtype
from genai_fast.kernels.cross_entropy import reference
from genai_fast.kernels.cross_entropy.layout import writable
from genai_fast.ops import checks
from genai_fast.ops.dispatch import KernelFunction, differentiated_again, library_call, observed, readable
from genai_fast.ops.planned import planned

_OP = "cross_entropy"


class CrossEntropyOutput(NamedTuple):
    """What `cross_entropy` and `linear_cross_entropy` return if more than the loss is asked for; else None.

    Attributes:
        loss: as without the others.
        z_loss: z lse^2, reduced as the loss is, which contains it; 0-d, or a value a position. Without a gradient.
        token_accuracy: share of positions that count whose largest logit is their target's, float32, 0-d; with
            reduction "none" 1 or 0 a position, 0 where it is ignored.
        predicted_tokens: int64, target's shape: where the logits are largest, the first of equal ones; -1 where the
            target is ignored. NaN counts as -inf.
    """

    loss: torch.Tensor
    z_loss: torch.Tensor | None = None
    token_accuracy: torch.Tensor | None = None
    predicted_tokens: torch.Tensor | None = None


class _CrossEntropy(KernelFunction):
    @staticmethod
    def forward(
        logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction, predict, inplace,
        backend,
    ):  # fmt: skip
        settings = (ignore_index, label_smoothing, z_loss, softcap, reduction, predict)
        return library_call(_OP, logits, target, class_weight, *settings, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, class_weight, *ctx.settings, _, ctx.inplace, ctx.backend = inputs
        _, lse, count, predicted = output
        ctx.mark_non_differentiable(lse, count, predicted)
        ctx.save_for_backward(logits, target, lse, count, class_weight)
        ctx.set_materialize_grads(False)
        ctx.written = False

    @staticmethod
    def backward(ctx, grad_loss, _lse, _count, _predicted):
        if grad_loss is None:
            return {}
        if ctx.written:  # autograd would say so too, but less clearly
            raise RuntimeError(
                f"{_OP}: inplace: expected one backward, got another after the logits hold their gradient; leave"
                f" inplace out where a graph is retained"
            )
        logits, target, lse, count, class_weight = ctx.saved_tensors
        arguments = (grad_loss, logits, target, lse, count, class_weight, *ctx.settings)
        if differentiated_again():
            grad = reference.cross_entropy_backward(*arguments)
        elif ctx.inplace and not observed() and not survey(arguments)[2] and writable(logits):
            grad, ctx.written = _over_the_logits(arguments, ctx.backend), True
        else:
            grad = library_call("cross_entropy_backward", *arguments, ctx.backend)
        return dict(logits=grad)


def _over_the_logits(arguments, backend):
    """The gradient in the memory of the logits, and autograd told so: a backward that saved them raises from now on."""
    grad_loss, logits, *rest = arguments
    logits = logits.detach()
    device, dtype, _ = survey((grad_loss, logits))
    select("cross_entropy_backward", backend, device, dtype)(grad_loss, logits, *rest, True)
    torch.autograd.graph.increment_version(logits)
    return logits


@planned
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    inplace: bool = False,
    class_weight: torch.Tensor | None = None,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Any:
    """loss = (1 - e) (lse - x[target]) + e (lse - mean x) + z lse^2, lse = logsumexp(x), e and z smoothing and z-loss.

    Forward reads the logits once and keeps two numbers per row in addition; no softmax is stored.
    With class weights w: (1 - e) w[target] (lse - x[target]) + e mean(w (lse - x)) + z lse^2.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64; rows may have any strides (logits[:, :-1] is not
            copied), classes that do not lie dense are copied.
        target: [...], int64: classes in [0, V), or ignore_index.
        ignore_index: positions with this target have loss and gradient 0 and do not count in the mean.
        label_smoothing: share in [0, 1] of the target that all classes have in common.
        z_loss: weight of the penalty lse^2, >= 0, which keeps the logits from drifting.
        reduction: "mean" over the positions that count (NaN if there are none, as in PyTorch), "sum", or "none" for
            one value a position.
        inplace: write the gradient over the logits, in backward: one tensor of their size less. Afterwards they hold
            their gradient, and a later backward that needs them raises, as does a second backward. A
            hint: where that cannot be told or the memory not be written (rows that overlap, checkpoints and other
            saved-tensor hooks, torch.compile, torch.func, batched or differentiable gradients) the gradient has its
            own.
        class_weight: w [V], any floating-point dtype, or None for 1: as weight of F.cross_entropy. The mean is then
            over the sum of w[target], that of z lse^2 over the number of positions that count. Without a gradient.
        softcap: c > 0 reads each logit as c tanh(logit / c), as Gemma 2 does; None: as it is.
        return_z_loss, return_token_accuracy, return_predicted_tokens: return a `CrossEntropyOutput` with these.

    Factors of single positions are left to the caller, from the single losses. By the probability of the target:
    loss = cross_entropy(logits, target, reduction="none"); (loss * (-loss).exp().detach()).sum() / loss.numel().

    Returns: The loss in nats, float32 (float64 if logits are), also under autocast: 0-d, or target's shape for "none".
        `CrossEntropyOutput` if more is asked for.
    Gradients: logits, to any order (the second and higher through plain PyTorch; torch.compile refuses those).
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64).
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated. Targets that are not
        classes are found on the CPU; on CUDA, where looking would wait for the device, and in compiled regions their
        loss and gradient are NaN.
    Source: Milakov & Gimelshein 2018, arXiv:1805.02867; Szegedy et al. 2015, arXiv:1512.00567 (smoothing); Chowdhery
        et al. 2022, arXiv:2204.02311 (z-loss); Gemma Team 2024, arXiv:2408.00118 (softcap).
    """
    checks.is_floating(_OP, "logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"{_OP}: logits: expected [..., V], got shape (); pass the logits of all classes")
    at_least_one_class(_OP, "logits", logits, logits.size(-1))
    settings = settings_of(_OP, ignore_index, label_smoothing, z_loss, softcap, reduction)
    wanted = wanted_of(_OP, return_z_loss, return_token_accuracy, return_predicted_tokens)
    check_targets(_OP, target, logits.shape[:-1], "logits", logits, logits.size(-1), ignore_index)
    class_weight = weights_of(_OP, class_weight, logits, logits.size(-1))
    # Saved-tensor hooks, of a checkpoint or one's own, keep tensors whose versions autograd then does not look at.
    inplace = (
        checks.flag(_OP, "inplace", inplace)
        and not observed()
        and not torch._C._autograd._top_saved_tensors_default_hooks(False)
    )
    if inplace and logits.requires_grad and torch.is_grad_enabled():
        _made_by_an_operation(logits)
    arguments = (logits, target, class_weight, *settings, any(wanted[1:]), inplace, forced_backend())
    loss, lse, _, predicted = _CrossEntropy.call(*arguments)
    if not any(wanted):
        return loss
    total = lse.sum(0)
    penalty = settings[2] * total * total
    return outputs_of(loss, penalty, predicted, target, settings, wanted)


def at_least_one_class(op: str, name: str, x: torch.Tensor, classes: int) -> None:
    if classes < 1:
        raise ValueError(f"{op}: {name}: expected at least one class, got shape {tuple(x.shape)}")


def settings_of(
    op: str, ignore_index: Any, label_smoothing: Any, z_loss: Any, softcap: Any, reduction: Any
) -> tuple[int, float, float, float, str]:
    """They, as the library ops take them."""
    checks.one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    ignore_index = checks.integer(op, "ignore_index", ignore_index)
    smoothing = checks.share(op, "label_smoothing", label_smoothing)
    z_loss = checks.factor(op, "z_loss", z_loss)
    if softcap is not None:
        softcap = checks.real(op, "softcap", softcap, "a finite number above 0, or None", math.ulp(0.0))
    return ignore_index, smoothing, z_loss, softcap or 0.0, reduction


def wanted_of(op: str, z_loss: Any, token_accuracy: Any, predicted_tokens: Any) -> tuple[bool, bool, bool]:
    """Which outputs beside the loss are asked for."""
    named = {"z_loss": z_loss, "token_accuracy": token_accuracy, "predicted_tokens": predicted_tokens}
    first, second, third = (checks.flag(op, f"return_{name}", value) for name, value in named.items())
    return first, second, third


def weights_of(op: str, class_weight: Any, like: torch.Tensor, classes: int) -> torch.Tensor | None:
    """The classes' weights in float32, or float64."""
    if class_weight is None:
        return None
    checks.is_floating(op, "class_weight", class_weight)
    checks.same_device(op, "class_weight", class_weight, "the logits" if op == _OP else "x", like)
    if class_weight.shape != (classes,):
        raise ValueError(
            f"{op}: class_weight: expected shape ({classes},), one for each class, got {tuple(class_weight.shape)}"
        )
    if class_weight.requires_grad:
        raise ValueError(
            f"{op}: class_weight: expected weights without a gradient, got requires_grad=True; pass"
            f" class_weight.detach()"
        )
    return class_weight.to(wide_dtype(like))


def outputs_of(
    loss: torch.Tensor, penalty: torch.Tensor, predicted: torch.Tensor, target: torch.Tensor, settings: Sequence[Any],
    wanted: Sequence[bool],
) -> CrossEntropyOutput:  # fmt: skip
    """The outputs that are asked for, of z lse^2 by row and of the largest logits' places."""
    counted, reduction = target != settings[0], settings[-1]
    number = counted.sum(dtype=loss.dtype)
    z_loss = accuracy = None
    if wanted[0]:
        z_loss = penalty.view(target.shape)
        if reduction != "none":
            z_loss = z_loss.sum() / number if reduction == "mean" else z_loss.sum()
    if wanted[1]:
        accuracy = ((predicted.view(target.shape) == target) & counted).float()
        accuracy = accuracy if reduction == "none" else accuracy.sum() / number.float()
    return CrossEntropyOutput(loss, z_loss, accuracy, predicted.view(target.shape) if wanted[2] else None)


def check_targets(
    op: str, target: Any, shape: tuple[int, ...], name: str, like: torch.Tensor, classes: int, ignore_index: int
) -> None:
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"{op}: target: expected a tensor, got {type(target).__name__}; pass a torch.Tensor of int64")
    if target.dtype is not torch.int64:
        raise TypeError(
            f"{op}: target: expected torch.int64 (classes, not probabilities), got {target.dtype};"
            f" convert it with .long()"
        )
    checks.same_device(op, "target", target, name, like)
    if target.shape != shape:
        raise ValueError(
            f"{op}: target: expected shape {tuple(shape)} as {name} has without its last dimension, got"
            f" {tuple(target.shape)}; reshape it"
        )
    if readable(target):
        least, most = (int(x) for x in torch.aminmax(target))
        if least < 0 or most >= classes:
            wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
            if wrong.numel():
                raise ValueError(
                    f"{op}: target: expected classes from 0 to {classes - 1} or {ignore_index} (ignore_index), got"
                    f" {int(wrong[0])}; correct it or set ignore_index"
                )


def _made_by_an_operation(logits: torch.Tensor) -> None:
    """Raise for a leaf or a view of one: its value would be lost, and autograd would hand out its memory as .grad."""
    base = logits._base if logits._is_view() else None
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            f"{_OP}: inplace: expected logits that an operation made, got a"
            f" {'leaf' if logits.is_leaf else 'view of one'} that requires gradients and would lose its value;"
            f" leave inplace out"
        )
