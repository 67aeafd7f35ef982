"""Whether tensors share memory: what is updated in place must not be another tensor's, or its own twice."""

from collections.abc import Sequence

import torch


def _dimensions(x: torch.Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions that have more than one element, the largest stride first."""
    return sorted(((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1), reverse=True)


def _reach(dimensions: Sequence[tuple[int, int]]) -> int:
    """Elements from the first to the last."""
    return sum(stride * (size - 1) for stride, size in dimensions)


def overlaps_itself(x: torch.Tensor) -> bool:
    """Whether elements share memory; also of views that only look as if (no slice or permutation does)."""
    dimensions = _dimensions(x)
    return x.numel() > 0 and any(stride <= _reach(dimensions[k + 1 :]) for k, (stride, _) in enumerate(dimensions))


def overlap(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether an element of x lies in the memory of one of y; of different strides also if only their ranges meet.

    Interleaved views, such as keys and values of one packed cache, do not overlap.
    """
    if not x.numel() or not y.numel() or x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return False
    between, dimensions = int(y.storage_offset()) - int(x.storage_offset()), _dimensions(x)
    if dimensions == _dimensions(y):
        return _reached(between, dimensions)
    return -_reach(_dimensions(y)) <= between <= _reach(dimensions)


def _reached(distance: int, dimensions: Sequence[tuple[int, int]]) -> bool:
    """Whether two elements of such a tensor are that far apart."""
    if not dimensions:
        return distance == 0
    (stride, size), *rest = dimensions
    reach = _reach(rest)
    least, most = -((reach - distance) // stride), (reach + distance) // stride  # beyond them `rest` does not reach
    steps = range(max(least, 1 - size), min(most, size - 1) + 1)
    return any(_reached(distance - step * stride, rest) for step in steps)
