"""A step's batch in parts, to save memory: which models allow it, how it is cut, and what each part weighs."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from genai_fast.contract import Carries, InTurns, offers
from genai_fast.errors import UsageError
from genai_fast.ops.linear_cross_entropy import counted, is_sum
from genai_fast.training import loss_output

Batch = tuple[torch.Tensor, ...]

NO_TURNS = "Step: accumulate: expected 1 for networks in turns, got more; remedy: a smaller batch"


def check(model: nn.Module | Callable[..., Any], count: int) -> None:
    """Whether a batch may be cut into `count` parts.

    Raises UsageError: it may not: the model's networks take turns, or its rows carry a state.
    """
    if count > 1 and (offers(model, InTurns) or inspect.isgeneratorfunction(model)):
        raise UsageError(NO_TURNS)
    if count > 1 and offers(model, Carries):
        raise UsageError(
            f"Step: accumulate: expected 1 for {type(model).__name__}, whose rows carry a state from batch to batch,"
            f" got {count}"
        )


def parts(batch: Batch, count: int) -> list[tuple[Batch, int]]:
    """The batch in `count` parts, fewer if it is smaller, and the rows of each."""
    if count == 1:
        return [(batch, 1)]
    sizes = {len(x) for x in batch if x.dim()}
    if len(sizes) != 1 or 0 in sizes:
        raise UsageError(
            f"Step: accumulate: expected tensors of one first dimension, got {[tuple(x.shape) for x in batch]}"
        )
    (size,) = sizes
    count = min(count, size)
    cut = zip(*(x.tensor_split(count) if x.dim() else [x] * count for x in batch), strict=True)
    firsts = next(k for k, x in enumerate(batch) if x.dim())
    return [(part, len(part[firsts])) for part in cut]


class Mean:
    """The mean of the parts' results, each weighted by what it is a mean over, and the shares of their gradients.

    A loss that is a mean over rows weighs its rows. One that is a mean over fewer things (targets that count) says over
    how many in an entry `weight`; of cross-entropy, and of a sum that is divided by a count, the graph says it.
    """

    def __init__(self, rows: int, count: int) -> None:
        self._rows, self._left, self._unit = rows, count, None
        self._sums: list[torch.Tensor] = []
        self._totals: list[Any] = []
        self._shares: Any = 0.0

    def add(self, result: Any, rows: int) -> torch.Tensor | None:
        """The loss to minimise for a part of this many rows; None if nothing in it counts."""
        entries, loss = loss_output.entries(result), loss_output.differentiable(loss_output.minimised(result))
        weights = weights_of(result, rows)
        weight = weights[loss_output.place(result)]
        values = [
            _where_counted(w, x.detach().float() if x.dtype.itemsize < 4 else x.detach()) * w
            for x, w in zip(entries, weights, strict=True)
        ]
        self._sums = [a + b for a, b in zip(self._sums, values, strict=True)] if self._sums else values
        self._totals = [a + b for a, b in zip(self._totals, weights, strict=True)] if self._totals else weights
        self._left -= 1
        if self._unit is None:  # such that the shares are about 1 in all, as float16 wants it
            parts = self._left + 1
            self._unit = torch.where(weight > 0, weight, 1.0) * parts if _is_tensor(weight) else self._rows
        share = weight / self._unit
        self._shares = self._shares + share
        if not _is_tensor(share):
            return loss * share
        if _is_tensor(weight) and weight.is_cpu and not weight and (self._left or self._shares):
            return None  # backward might make NaN of 0 / 0
        return _where_counted(weight, loss) * share.to(loss.dtype)

    def means(self, result: Any) -> Any:
        """Of all parts, in the form of a part's result."""
        means = [s / t for s, t in zip(self._sums, self._totals, strict=True)]
        if (place := _place(result)) is not None:
            means[place] = self._totals[place]
        entries = loss_output.entries(result)
        return loss_output.like(result, [m.to(x.dtype) for m, x in zip(means, entries, strict=True)])

    def factor(self) -> torch.Tensor | None:
        """What the gradients are still to be multiplied by; None: nothing."""
        return 1.0 / self._shares if _is_tensor(self._shares) else None


def weights_of(result: Any, rows: float) -> list[Any]:
    """What each entry of a result is a mean over, if a mean over all rows weighs `rows`: numbers, or 0-d tensors."""
    entries = loss_output.entries(result)
    if (place := _place(result)) is not None:
        return [entries[place].detach()] * len(entries)
    if hasattr(result, "nats"):  # a loss for each token, beside means over the sequences
        return [rows * result.tokens if name == "loss" else rows for name in result._fields]
    weight = _from_graph(loss_output.minimised(result), rows)
    return [rows if weight is None else weight] * len(entries)


def _place(result: Any) -> int | None:
    """Of the entry that says what the others weigh."""
    names = list(result) if isinstance(result, Mapping) else getattr(result, "_fields", ())
    return names.index("weight") if "weight" in names else None


def _where_counted(weight: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.where(weight > 0, x, 0.0) if _is_tensor(weight) else x


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _from_graph(loss: torch.Tensor, rows: float) -> torch.Tensor | None:
    """Over how many things a loss that is made of cross-entropy is a mean; None: over its rows, as far as one sees."""
    # A sum that is divided by the number of rows is a mean over them.
    found = [None if w is not None and w.is_cpu and w == rows else w for w in _counts(loss.grad_fn)]
    weights = [w for w in found if w is not None]
    if not weights:
        return None
    if len(weights) < len(found):
        warnings.warn(
            "Step: accumulate: the loss adds a mean over all rows to one over the targets that count; parts are"
            " weighted by those targets, so the result is the whole batch's only if each part has as many of them",
            stacklevel=2,
        )
    return weights[0].detach().float()


_MEANS = ("MeanBackward", "MseLossBackward", "BinaryCrossEntropy", "L1LossBackward", "HuberLossBackward", "KlDiv")


def _counts(node: Any) -> Iterator[torch.Tensor | None]:
    """Of each mean among a 0-d tensor's summands, what it is over; None: of one over all that there is."""
    if node is None or len(node._input_metadata[0].shape):
        return
    name = node.name()
    if name in ("NllLossBackward0", "NllLoss2DBackward0"):
        if node._saved_reduction == 1:
            yield node._saved_total_weight
    elif (count := counted(node)) is not None:
        yield count
    elif name == "DivBackward0" and node.next_functions[1][0] is None and _is_sum(node.next_functions[0][0]):
        yield node._saved_other
    elif name.startswith(_MEANS) and any(f is not None and f._input_metadata[0].shape for f, _ in node.next_functions):
        yield None
    else:
        for following, _ in node.next_functions:
            yield from _counts(following)


def _is_sum(node: Any) -> bool:
    """Whether a 0-d tensor is a sum of several numbers, or nothing but a conversion or a multiple of one."""
    while node is not None and node.name() in ("ToCopyBackward0", "MulBackward0", "NegBackward0"):
        node = node.next_functions[0][0]
    return (
        node is not None
        and not node._input_metadata[0].shape
        and (node.name().startswith("SumBackward") or getattr(node, "_saved_reduction", None) == 2 or is_sum(node))
    )
