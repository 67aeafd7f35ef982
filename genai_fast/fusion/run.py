"""Modules called one after another, those in a row that one call serves as one."""

import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from genai_fast.backends import FallbackWarning, choose, forced_backend, is_plain
from genai_fast.fusion.chains import global_hooks, letter, spans
from genai_fast.fusion.implementations import TORCH, decide
from genai_fast.fusion.layout import of_chain, relaid
from genai_fast.fusion.operands import Chain, memory_format
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
