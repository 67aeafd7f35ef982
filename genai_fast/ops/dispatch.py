"""Calls without what small tensors cannot afford: signature inspection, and the dispatcher where nothing listens."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from genai_fast.backends import select, survey


def _transformed() -> bool:
    """Whether torch.compile or one of torch.func's transforms sees this call."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def observed() -> bool:
    """Whether a compiler, a transform or a dispatch mode must see what is called."""
    return _transformed() or bool(torch._C._len_torch_dispatch_stack())


def library_call(name: str, *arguments: Any) -> Any:
    """torch.ops.genai_fast.<name>; straight to the implementation where the dispatcher would do nothing (10 us).

    It has work to do for a compiler, a transform, a dispatch mode (fake tensors, tracing) and special tensors.
    """
    if not observed():
        device, dtype, special = survey(arguments)
        if not special:
            return select(name, arguments[-1], device, dtype)(*arguments[:-1])
    return getattr(torch.ops.genai_fast, name)(*arguments)


def needs_graph(arguments: Any) -> bool:
    """Whether autograd records what is made of these arguments."""
    if torch.is_grad_enabled():
        for x in arguments:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                return True
    return False


class KernelFunction(torch.autograd.Function):
    """A Function with a static setup_context; `call` takes forward's arguments by position, all of them."""

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        # `apply` binds arguments to forward's signature on every call (20 us). Neither torch.func's transforms nor
        # torch.compile can do without it; everything else can start where it ends, or at forward if nothing is kept.
        if _transformed():
            return cls.apply(*arguments)
        if forward_ad._current_level >= 0 or needs_graph(arguments):
            return super(torch.autograd.Function, cls).apply(*arguments)
        return cls.forward(*arguments)
