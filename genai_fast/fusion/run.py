"""Modules called one after another, those in a row that one call serves as one."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from genai_fast.backends import FallbackWarning, choose, forced_backend, is_plain
from genai_fast.fusion.chains import Residual, global_hooks, letter, obstacle, replaced, spans
from genai_fast.fusion.classes import original
from genai_fast.fusion.implementations import TORCH, decide
from genai_fast.fusion.layout import of_chain, relaid
from genai_fast.fusion.norms import residual_why_not
from genai_fast.fusion.operands import Chain, memory_format
from genai_fast.fusion.operands import Residual as Added
from genai_fast.ops.dispatch import left_to_torch


def run(modules: Sequence[nn.Module], x: Any, random: bool = True) -> Any:
    """What calling the modules one after another gives. Not `random`: dropout is PyTorch's, with its numbers."""
    if global_hooks() or left_to_torch():
        return _one_by_one(modules, x)
    wanted = None  # the layout that PyTorch's x would have here, if x has another
    for start, stop, letters, fused in spans("".join([letter(module, random) for module in modules])):
        here = modules[start:stop]
        # What is not torch's own may ask for the layout, as x.view does; a Linear has its result in another one.
        if letters[0] in ".L" and wanted is not None:
            x, wanted = relaid(x, wanted), None
        if fused and letters[0] == "L":
            x, here, letters = here[0](x), here[1:], letters[1:]
        chain = _chain(letters, here) if fused and _fits(x) else None
        if chain is None:
            x = _one_by_one(here, x)
            continue
        implementation = decide(here, chain, x)
        if chain.conv is None or (implementation is TORCH and wanted is None):
            x = implementation.run(chain, x)
            continue
        given = wanted
        if given is None and x.dim() == 4:
            given = memory_format(x)
        x = implementation.run(chain, x)
        if x.dim() == 4 and given is not None:
            plain = of_chain(chain, x, given)
            wanted = None if memory_format(x) is plain else plain
    return x if wanted is None else relaid(x, wanted)


class Pending(NamedTuple):
    """A norm, perhaps with its activation, that waits for the residual, and its input."""

    modules: list[nn.Module]
    x: torch.Tensor


_SUM = Residual()


def flat(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules, with its children in the place of each nn.Sequential that does nothing but call them."""
    for module in modules:
        if isinstance(module, nn.Sequential) and _only_calls(module):
            yield from flat(module._modules.values())
        else:
            yield module


def _only_calls(module: nn.Sequential) -> bool:
    cls = original(type(module))
    methods = ("forward", "__iter__", "__call__", "_call_impl")
    own = all(getattr(cls, name) is getattr(nn.Sequential, name) for name in methods)
    return own and not obstacle(module) and not replaced(nn.Sequential)


def begin(modules: Iterable[nn.Module], x: Any, quiet: bool, random: bool = True) -> Any:
    """What calling the modules one after another gives; or a Pending, if they end in a norm that can wait.

    Args:
        quiet: whether nothing is computed until `end`; else the norm only waits if its input was made here, so that
            nothing can change it.
        random: as of `run`.
    """
    modules = list(flat(modules))
    at = norm_at_end(modules)
    if at is None or global_hooks() or left_to_torch():
        return run(modules, x, random)
    if not quiet and (at == 0 or letter(modules[at - 1]) not in "CLNG"):
        return run(modules, x, random)
    return Pending(modules[at:], run(modules[:at], x, random))


def norm_at_end(modules: Sequence[nn.Module]) -> int | None:
    """Where the norm is that the modules end in, by itself or with an activation after it; None if there is none."""
    word = "".join([letter(module) for module in modules[-2:]])
    if word[-1:] in ("N", "G"):
        return len(modules) - 1
    return len(modules) - 2 if len(word) == 2 and word[0] in "NG" and word[1] in "AaIP" else None


def end(pending: Pending, residual: Any, add: Callable[[Any, Any], Any], act: nn.Module | None) -> Any:
    """act(add(..., residual)) of what waits; without an act the sum itself."""
    waiting, x = pending
    modules = [*waiting, _SUM] if act is None else [*waiting, _SUM, act]
    (span, *others) = spans("".join([letter(module) for module in modules]))
    chain = _chain(span.letters, modules[: span.stop]) if "R" in span.letters and _fits(x) else None
    chain = chain and chain._replace(residual=Added(residual, add, len(waiting) > 1))
    if chain is None or residual_why_not(chain, x):
        y = add(run(waiting, x), residual)
        return y if act is None else act(y)
    y = decide(modules[: span.stop], chain, x).run(chain, x)
    return act(y) if others else y


def _one_by_one(modules: Iterable[nn.Module], x: Any) -> Any:
    for module in modules:
        x = module(x)
    return x


def _chain(letters: str, modules: Sequence[nn.Module]) -> Chain | None:
    try:
        return Chain.of(letters, modules)
    except (TypeError, ValueError, AttributeError, LookupError):  # no number, or deleted: the module says so itself
        return None


def _fits(x: Any) -> bool:
    """Whether the ops take x as the modules would."""
    if not is_plain(x):
        return False
    if torch.compiler.is_compiling():
        return True
    usual = x.layout is torch.strided and not x.is_nested and x.dim() > 1 and not x.is_meta
    return usual and _served(forced_backend(), x.device.type, x.dtype)


@functools.cache
def _served(forced: str, device: str, dtype: torch.dtype) -> bool:
    """Whether there is a kernel. PyTorch's own modules are faster than the reference, unless that is asked for."""
    _, reason = choose("batch_norm_act_apply", forced, device, dtype)
    if reason:
        warnings.warn(f"FusedSequential calls its modules one by one: {reason}", FallbackWarning, stacklevel=5)
    return not reason
