"""CPU size thresholds below which the overhead of a fused call exceeds its gain over PyTorch's own modules.

Measured on two AVX-512 cores with `pytest bench/bench_layers.py` at many sizes. Each function returns the reason why a
call is too small, or "".
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch

NORM_TRAINING = {2: 1 << 18}  # elements, by number of dimensions
NORM_TRAINING_PLANES = 1 << 17
NORM_EVALUATION = 1 << 21  # an activation that works in place on what the cache holds is hard to beat
NORM_PRELU = {False: 1 << 20, True: 1 << 16}  # in evaluation, in training
PRELU = 1 << 16  # with gradients
DROPOUT = 1 << 13
FOLD = 1 << 21
CONVOLUTION = 1 << 22  # multiplications: choosing an implementation costs 20 us
RECURRENCE = 8  # steps
RMS_NORM = 1 << 17
CROSS_ENTROPY = 1 << 17
SAMPLING = 1 << 13
ATTENTION = 1 << 17  # scores
MULTIHEAD = {"dropout": 1 << 15, "gradients": 1 << 20, "neither": 3 << 19}  # scores: PyTorch's is one call too
WRITTEN_RMS_NORM = {False: 1 << 16, True: 1 << 15}  # without, with gradients
GATED = {"silu": (1 << 17, 1 << 18), "gelu": (1 << 14, 1 << 15)}  # without, with gradients
ROTARY = 1 << 16
GROUP_NORM = {False: (1 << 19, 1 << 20), True: (1 << 16, 1 << 18)}  # instance norm or not -> without, with gradients

_ignored: ContextVar[bool] = ContextVar("ignored", default=False)


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Inside the block tensors of any size run fused: to compare numbers on small models."""
    token = _ignored.set(True)
    try:
        yield
    finally:
        _ignored.reset(token)


def _too_small(what: str, size: int, least: int) -> str:
    return "" if size >= least or _ignored.get() else _fewer(what, size, least)


@functools.lru_cache(1024)  # small tensors are those that wait for Python
def _fewer(what: str, size: int, least: int) -> str:
    return f"{size} {what} are fewer than {least}"


def norm(training: bool, x: torch.Tensor, prelu: bool = False) -> str:
    """Batch norm of x with the activation after it."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return ""
    if prelu:
        return _too_small("elements", x.numel(), NORM_PRELU[training])
    least = NORM_TRAINING.get(x.dim(), NORM_TRAINING_PLANES) if training else NORM_EVALUATION
    return _too_small("elements", x.numel(), least)


def prelu(gradients: bool, x: torch.Tensor) -> str:
    """PReLU of x by itself."""
    if not x.is_cpu:
        return ""
    if not gradients and not _ignored.get():
        return "PyTorch's forward is one pass too, and no slower"
    return _too_small("elements", x.numel(), PRELU)


def dropout(x: torch.Tensor) -> str:
    """Dropout of x with the activation before it."""
    return "" if not x.is_cpu or torch.compiler.is_compiling() else _too_small("elements", x.numel(), DROPOUT)


def convolution(x: torch.Tensor, multiplications: int) -> str:
    """The choice of an implementation for a convolution of x."""
    return _too_small("multiplications", multiplications, CONVOLUTION) if x.is_cpu else ""


def fold(elements: int, weight: torch.Tensor) -> str:
    """Folding a norm into the weight, at every call, for this number of output elements."""
    return _too_small("elements of output", elements, FOLD) or (
        "" if elements >= weight.numel() * 4 else "the weight is large compared with the output"
    )


def recurrence(x: torch.Tensor, steps: int) -> str:
    """A recurrent layer over the sequence x, whose weights are packed first."""
    return "" if not x.is_cpu or torch.compiler.is_compiling() else _too_small("steps", steps, RECURRENCE)


def rms_norm(x: torch.Tensor) -> str:
    """RMS norm of x as one call, which PyTorch's is not."""
    return _too_small("elements", x.numel(), RMS_NORM) if x.is_cpu else ""


def attention(q: torch.Tensor, k: torch.Tensor) -> str:
    """Attention in one call, in place of products and a softmax."""
    return _too_small("scores", q.numel() // q.size(3) * k.size(2), ATTENTION) if q.is_cpu else ""


def multihead(x: torch.Tensor, scores: int, dropout: bool, gradients: bool) -> str:
    """The attention of nn.MultiheadAttention as one call of ours."""
    kind = "dropout" if dropout else "gradients" if gradients else "neither"
    return _too_small("scores", scores, MULTIHEAD[kind]) if x.is_cpu else ""


def sampling(mu: torch.Tensor) -> str:
    """The sampling of latents in one call."""
    return _too_small("latents", mu.numel(), SAMPLING) if mu.is_cpu and not torch.compiler.is_compiling() else ""


def cross_entropy(logits: torch.Tensor) -> str:
    """Cross-entropy as one call each way."""
    if not logits.is_cpu or torch.compiler.is_compiling():
        return ""
    return _too_small("logits", logits.numel(), CROSS_ENTROPY)


def written_rms_norm(x: torch.Tensor) -> str:
    """RMS norm of x as one call, in place of a class that composes it of six."""
    return _too_small("elements", x.numel(), WRITTEN_RMS_NORM[torch.is_grad_enabled()]) if x.is_cpu else ""


def gated(activation: str, x: torch.Tensor) -> str:
    """An activation of x times another tensor as one call, in place of two."""
    if not x.is_cpu:
        return ""
    gradients, kind = torch.is_grad_enabled(), activation[:4]
    if kind == "silu" and gradients and x.dtype is not torch.float32 and not _ignored.get():
        return "PyTorch's backward of a narrow dtype is as fast"
    return _too_small("elements", x.numel(), GATED[kind][gradients])


def rotary(x: torch.Tensor) -> str:
    """The turn of queries or keys as one call, in place of five."""
    return _too_small("elements", x.numel(), ROTARY) if x.is_cpu else ""


def group_norm(instance: bool, gradients: bool, x: torch.Tensor) -> str:
    """Group or instance norm of x with the activation after it."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return ""
    return _too_small("elements", x.numel(), GROUP_NORM[instance][gradients])
