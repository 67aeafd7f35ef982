"""autograd.Function without its per-call signature inspection, which costs more than a small kernel."""

from __future__ import annotations

from typing import Any

import torch


class KernelFunction(torch.autograd.Function):
    """A Function with a static setup_context; `call` takes forward's arguments by position, all of them."""

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        # `apply` binds arguments to forward's signature on every call (20 us). Neither torch.func's transforms nor
        # torch.compile can do without it; everything else can start where it ends.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return cls.apply(*arguments)
        return super(torch.autograd.Function, cls).apply(*arguments)
