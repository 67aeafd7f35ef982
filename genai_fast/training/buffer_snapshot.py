"""The tensors that a step changes beside the optimizers' own, put back when an update was skipped."""

import contextlib
import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Kept:
    """Copies of modules' buffers (batch norm's statistics, a carried state) as they are when `take` is called.

    Args:
        modules: whose buffers.
        others: whose parameters that are not in `trained` too: a moving average of weights.
        trained: parameters that optimizers update.
    """

    def __init__(
        self, modules: Iterable[nn.Module], others: Iterable[nn.Module], trained: Iterable[nn.Parameter]
    ) -> None:
        ids = {id(p) for p in trained}
        # Where a module holds them: what a step replaces is found too.
        buffers = {(id(m), k): (m._buffers, k) for root in modules for m in root.modules() for k in m._buffers}
        inside = [m for root in others for m in root.modules()]
        held = {(id(m), k): (m._parameters, k, p) for m in inside for k, p in m._parameters.items()}
        parameters = {key: place for key, (*place, p) in held.items() if p is not None and id(p) not in ids}
        self._places = [*buffers.values(), *parameters.values()]

    @torch.no_grad()
    def take(self) -> None:
        found = [(holder, name, holder.get(name)) for holder, name in self._places]
        groups: dict[tuple, list[tuple]] = {}
        for item in found:
            x = item[2]
            if x is None or 0 in x.stride():  # an expanded constant: nothing can be written to it
                continue
            groups.setdefault((x.dtype, x.device), []).append(item)
        # One copy for each dtype: buffers are many and small.
        self._groups = [(items, _joined([x for *_, x in items])) for items in groups.values()]

    @torch.no_grad()
    def put_back(self) -> None:
        """To the values, and where the step has replaced a tensor to the tensors, of the last `take`."""
        for items, copy in self._groups:
            for (holder, name, x), old in zip(items, _split(copy, items), strict=True):
                holder[name] = x
                x.copy_(old)

    @torch.no_grad()
    def put_back_where(self, flag: torch.Tensor) -> None:
        """The same if `flag`, a 0-d bool on the device, is set; nothing waits for it.

        A tensor that the step has replaced by one of another shape stays.
        """
        for items, copy in self._groups:
            pairs = [
                (holder[name], old)
                for (holder, name, x), old in zip(items, _split(copy, items), strict=True)
                if holder[name].shape == x.shape
            ]
            if pairs:
                now, old = zip(*pairs, strict=True)
                kept = torch.where(flag.to(copy.device), _joined(old), _joined(now))
                pieces = kept.split([x.numel() for x in now])
                torch._foreach_copy_(list(now), [piece.view(x.shape) for piece, x in zip(pieces, now, strict=True)])


def _joined(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def _split(copy: torch.Tensor, items: list[tuple]) -> list[torch.Tensor]:
    pieces = copy.split([x.numel() for *_, x in items])
    return [piece.view(x.shape) for piece, (*_, x) in zip(pieces, items, strict=True)]


def modules_of(function: Any) -> list[nn.Module]:
    """Modules whose buffers a call of the function may change: itself, or those that its variables are."""
    if isinstance(function, functools.partial):
        return [m for x in (function.func, *function.args, *function.keywords.values()) for m in modules_of(x)]
    owner = getattr(function, "__self__", None) if inspect.ismethod(function) else function
    found = [owner, *getattr(owner, "__dict__", {}).values()]
    code = inspect.unwrap(function)
    code = getattr(code, "__func__", code)
    if inspect.isfunction(code):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            variables = inspect.getclosurevars(code)
            found += [*variables.nonlocals.values(), *variables.globals.values()]
    return [m for m in found if isinstance(m, nn.Module)]
