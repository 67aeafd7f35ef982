"""The cross-entropy of logits, and of a linear layer's logits that never exist as a whole."""

from typing import Any

import torch

from genai_fast.backends import forced_backend, select, survey
from genai_fast.kernels.cross_entropy import reference
from genai_fast.kernels.cross_entropy.layout import writable
from genai_fast.kernels.cross_entropy.linear import default_chunk
from genai_fast.ops import checks
from genai_fast.ops.dispatch import KernelFunction, differentiated_again, library_call, observed, readable
from genai_fast.ops.planned import planned
from genai_fast.precision import autocast_dtype

_OP, _LINEAR = "cross_entropy", "linear_cross_entropy"


class _CrossEntropy(KernelFunction):
    @staticmethod
    def forward(logits, target, ignore_index, label_smoothing, z_loss, reduction, inplace, backend):
        return library_call(_OP, logits, target, ignore_index, label_smoothing, z_loss, reduction, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, *ctx.settings, ctx.inplace, ctx.backend = inputs
        _, lse, count = output
        ctx.mark_non_differentiable(lse, count)
        ctx.save_for_backward(logits, target, lse, count)
        ctx.set_materialize_grads(False)
        ctx.written = False

    @staticmethod
    def backward(ctx, grad_loss, _lse, _count):
        if grad_loss is None:
            return {}
        if ctx.written:  # autograd would say so too, but less clearly
            raise RuntimeError(
                f"{_OP}: inplace: expected one backward, got another after the logits hold their gradient; leave"
                f" inplace out where a graph is retained"
            )
        logits, target, lse, count = ctx.saved_tensors
        arguments = (grad_loss, logits, target, lse, count, *ctx.settings)
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
) -> torch.Tensor:
    """loss = (1 - e) (lse - x[target]) + e (lse - mean x) + z lse^2, lse = logsumexp(x), e and z smoothing and z-loss.

    Forward reads the logits once and keeps two numbers per row in addition; no softmax is stored.

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

    Class weights are left to the caller, from the single losses: with w = weight[target], 0 where it is ignored,
    (cross_entropy(logits, target, reduction="none") * w).sum() / w.sum() is F.cross_entropy's mean without smoothing.

    Returns: The loss in nats, float32 (float64 if logits are), also under autocast: 0-d, or target's shape for "none".
    Gradients: logits, to any order (the second and higher through plain PyTorch; torch.compile refuses those).
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64).
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated. Targets that are not
        classes are found on the CPU; on CUDA, where looking would wait for the device, and in compiled regions their
        loss and gradient are NaN.
    Source: Milakov & Gimelshein 2018, arXiv:1805.02867; Szegedy et al. 2015, arXiv:1512.00567 (smoothing); Chowdhery
        et al. 2022, arXiv:2204.02311 (z-loss).
    """
    checks.is_floating(_OP, "logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"{_OP}: logits: expected [..., V], got shape (); pass the logits of all classes")
    _at_least_one_class(_OP, "logits", logits, logits.size(-1))
    settings = _settings(_OP, ignore_index, label_smoothing, z_loss, reduction)
    _targets(_OP, target, logits.shape[:-1], "logits", logits, logits.size(-1), ignore_index)
    # Saved-tensor hooks, of a checkpoint or one's own, keep tensors whose versions autograd then does not look at.
    inplace = (
        checks.flag(_OP, "inplace", inplace)
        and not observed()
        and not torch._C._autograd._top_saved_tensors_default_hooks(False)
    )
    if inplace and logits.requires_grad and torch.is_grad_enabled():
        _made_by_an_operation(logits)
    return _CrossEntropy.call(logits, target, *settings, inplace, forced_backend())[0]


def _at_least_one_class(op: str, name: str, x: torch.Tensor, classes: int) -> None:
    if classes < 1:
        raise ValueError(f"{op}: {name}: expected at least one class, got shape {tuple(x.shape)}")


def _settings(
    op: str, ignore_index: Any, label_smoothing: Any, z_loss: Any, reduction: Any
) -> tuple[int, float, float, str]:
    """They, as the library ops take them."""
    checks.one_of(op, "reduction", reduction, ("mean", "sum", "none"))
    ignore_index = checks.integer(op, "ignore_index", ignore_index)
    smoothing = checks.share(op, "label_smoothing", label_smoothing)
    return ignore_index, smoothing, checks.factor(op, "z_loss", z_loss), reduction


def _targets(
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


class _LinearCrossEntropy(KernelFunction):
    """Gradients of the sum over rows are made in forward, chunk by chunk, and scaled in backward.

    To make them in backward instead would cost the first of the three matrix products twice. Those of the single
    losses (reduction "none") cannot be had before their upstream gradients are, so these pay that.
    """

    @staticmethod
    def forward(
        x, weight, bias, target, ignore_index, label_smoothing, z_loss, reduction, chunk, of_x, of_weight, of_bias,
        backend,
    ):  # fmt: skip
        return library_call(
            _LINEAR, x, weight, bias, target, None, ignore_index, label_smoothing, z_loss, reduction, chunk, of_x,
            of_weight, of_bias, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, target, *ctx.settings, ctx.chunk, _, _, _, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, bias, target, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, _grad_x, _grad_weight, _grad_bias):
        if grad_loss is None:
            return {}
        x, weight, bias, target, *made = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        reduction = ctx.settings[-1]
        if differentiated_again():
            grads = _differentiable(grad_loss, x, weight, bias, target, ctx.settings, needed)
        elif reduction == "none":
            arguments = (x, weight, bias, target, grad_loss, *ctx.settings, ctx.chunk, *needed, ctx.backend)
            _, *grads = library_call(_LINEAR, *arguments)
        else:
            if reduction == "mean":  # where no target counts, all gradients are 0
                grad_loss = grad_loss / (target != ctx.settings[0]).sum(dtype=grad_loss.dtype).clamp(min=1)
            grads = _scaled(made, grad_loss)
        of = {"x": x, "weight": weight, "bias": bias}.items()
        return {n: g.to(p.dtype) for g, (n, p), wanted in zip(grads, of, needed, strict=True) if wanted}


def counted(node: Any) -> torch.Tensor | None:
    """Over how many targets one of these ops, the node of a graph, is a mean; None: another node or reduction."""
    function = getattr(node, "_forward_cls", None)
    if function not in (_CrossEntropy, _LinearCrossEntropy) or node.settings[-1] != "mean":
        return None
    if function is _CrossEntropy:
        return node.saved_tensors[3]
    return (node.saved_tensors[3] != node.settings[0]).sum()


def is_sum(node: Any) -> bool:
    """Whether a graph's node is one of these ops, summed."""
    return getattr(node, "_forward_cls", None) in (_CrossEntropy, _LinearCrossEntropy) and node.settings[-1] == "sum"


def _scaled(made, grad_loss):
    """What forward made times the upstream gradient: over it if the graph goes, since that is as large as weight."""
    kept = observed() or survey((grad_loss,))[2] or torch._C._autograd._get_current_graph_task_keep_graph()
    # A second backward of a graph that is kept must find them as they are. An alias, so that it can become .grad.
    return [g * grad_loss if kept else g.mul_(grad_loss).detach() for g in made]


def _differentiable(grad_loss, x, weight, bias, target, settings, needed):
    """Gradients of x, weight and bias in plain PyTorch, by the logits as a whole."""
    logits = torch.nn.functional.linear(x, weight, bias)
    counted = reference.count_of(target != settings[0], grad_loss.dtype, settings[-1])
    grad = reference.cross_entropy_backward(grad_loss, logits, target, None, counted, *settings)
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
) -> torch.Tensor:
    """`cross_entropy` of x weight^T + bias, by chunks of rows: the logits [..., V] are never whole in memory.

    The gradients of the sum over rows are made in forward, while a chunk's logits are there, and multiplied by the
    upstream gradient in backward; with reduction "none" they are made in backward, which costs one more matrix product.
    Worth it where the logits are what fills the memory; where they fit, `cross_entropy(F.linear(...))` is as fast.

    Args:
        x: [..., D], float32, bfloat16, float16 or float64.
        weight: [V, D], x's dtype (any floating-point dtypes under autocast, which casts x, weight and bias).
        target, ignore_index, label_smoothing, z_loss, reduction: as of `cross_entropy`.
        bias: [V] or None.
        chunk: rows at a time; by default as many as make 64 MiB of logits on the CPU, 256 MiB on CUDA.

    Returns: The loss, as `cross_entropy` gives it.
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
    _at_least_one_class(_LINEAR, "weight", weight, classes)
    if bias is not None:
        _partner("bias", bias, x)
        if bias.shape != (classes,):
            raise ValueError(
                f"{_LINEAR}: bias: expected shape ({classes},) as weight gives {classes} classes, got"
                f" {tuple(bias.shape)}"
            )
    settings = _settings(_LINEAR, ignore_index, label_smoothing, z_loss, reduction)
    _targets(_LINEAR, target, x.shape[:-1], "x", x, classes, ignore_index)
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
    loss = _LinearCrossEntropy.call(rows, weight, bias, t, *settings, chunk, *needed, forced_backend())[0]
    return loss.view(target.shape) if reduction == "none" else loss


def _partner(name: str, p: Any, x: torch.Tensor) -> None:
    """A tensor of x's device, and of its dtype unless autocast casts them."""
    checks.is_floating(_LINEAR, name, p)
    checks.same_device(_LINEAR, name, p, "x", x)
    if autocast_dtype(x.device.type) is None:
        checks.same_dtype(_LINEAR, name, p, "x", x)
