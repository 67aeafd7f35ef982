"""A step's batch in parts, to save memory: which models allow it, and how it is cut."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from genai_fast.errors import UsageError

Batch = tuple[torch.Tensor, ...]

NO_TURNS = "Step: accumulate: expected 1 for networks in turns, got more; remedy: a smaller batch"


def check(model: nn.Module | Callable[..., Any], count: int) -> None:
    """Whether a batch may be cut into so many parts.

    Raises:
        UsageError: it may not: the model's networks take turns, or its rows carry a state.
    """
    if count > 1 and (hasattr(model, "turns") or inspect.isgeneratorfunction(model)):
        raise UsageError(NO_TURNS)
    if count > 1 and hasattr(model, "carried"):
        raise UsageError(
            f"Step: accumulate: expected 1 for {type(model).__name__}, whose rows carry a state from batch to batch,"
            f" got {count}"
        )


def parts(batch: Batch, count: int) -> list[tuple[Batch, float]]:
    """The batch in `count` parts, fewer if it is smaller, with the share of each in it."""
    if count == 1:
        return [(batch, 1.0)]
    sizes = {len(x) for x in batch if x.dim()}
    if len(sizes) != 1 or 0 in sizes:
        raise UsageError(
            f"Step: accumulate: expected tensors of one first dimension, got {[tuple(x.shape) for x in batch]}"
        )
    (size,) = sizes
    count = min(count, size)
    cut = zip(*(x.tensor_split(count) if x.dim() else [x] * count for x in batch), strict=True)
    firsts = next(k for k, x in enumerate(batch) if x.dim())
    return [(part, len(part[firsts]) / size) for part in cut]
