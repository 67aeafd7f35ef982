"""Functions of PyTorch that an op serves where it takes the arguments: for modules, and for methods that call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from genai_fast import ops
from genai_fast.backends import choose, forced_backend, is_plain
from genai_fast.fusion import thresholds
from genai_fast.fusion.chains import watched
from genai_fast.ops.dispatch import left_to_torch
from genai_fast.precision import autocast_dtype


def cross_entropy(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """F.cross_entropy: by one fused pass over the logits each way, or by PyTorch.

    PyTorch's own serves targets that are probabilities, targets other than int64, sizes at which it is as fast, tensor
    subclasses, and dtypes without a kernel; and it says what is wrong with arguments.
    """
    settings = (ignore_index, label_smoothing, reduction)
    if size_average is not None or reduce is not None or not _usual(*settings):
        return _cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    if not _is_ours(input, target) or not weights_fit(weight, input, 0 if input.dim() < 2 else 1):
        return _cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    logits = input.movedim(1, -1) if input.dim() > 2 else input
    loss = ops.cross_entropy(
        logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction,
        class_weight=weight,
    )  # fmt: skip
    return loss if autocast_dtype(input.device.type) is not None else loss.to(input.dtype)


_cross_entropy = F.cross_entropy

# What serves a function that a method calls by its name.
SERVED: dict[Any, Callable[..., Any]] = {F.cross_entropy: cross_entropy}


def instead_of(function: Any) -> Callable[..., Any]:
    """Calls what serves it, unless it is handed another function, or calls are followed."""
    served = SERVED[function]

    def call(now: Any, *args: Any, **named: Any) -> Any:
        return (served if now is function and not watched() else now)(*args, **named)

    return call


def weights_fit(weight: Any, logits: torch.Tensor, classes: int) -> bool:
    """Whether the op takes these class weights, the logits' classes being that dimension."""
    if weight is None:
        return True
    return (
        is_plain(weight) and not weight.requires_grad and weight.shape == (logits.size(classes),)
        and weight.dtype is logits.dtype and weight.device == logits.device
    )  # fmt: skip


def _usual(ignore_index: Any, label_smoothing: Any, reduction: Any) -> bool:
    """Whether these are what the op takes for settings."""
    numbers = isinstance(ignore_index, int) and isinstance(label_smoothing, (int, float)) and 0 <= label_smoothing <= 1
    return numbers and reduction in ("mean", "sum", "none")


def _is_ours(input: Any, target: Any) -> bool:
    """Whether the op takes these and is worth its call."""
    if not is_plain(input) or not is_plain(target) or left_to_torch():
        return False
    classes = 0 if input.dim() < 2 else 1
    if target.dtype is not torch.int64 or input.dim() == 0 or not input.is_floating_point():
        return False
    if target.shape != input.shape[:classes] + input.shape[classes + 1 :] or 0 in input.shape:
        return False
    if target.device != input.device or (thresholds.cross_entropy(input) and not forced_backend()):
        return False
    if torch.compiler.is_compiling():
        return input.dtype is not torch.float64
    return not choose("cross_entropy", forced_backend(), input.device.type, input.dtype)[1]
