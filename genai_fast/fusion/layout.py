"""Memory layouts within a container: an implementation may use another one, which nothing outside it sees.

What leaves a chain, and the gradients that reach what was given to it, lie in memory as PyTorch would have them at that
place. It is more than courtesy: `x.view` raises on another layout, and the backward of PyTorch's instance norm computes
wrong numbers from a gradient in another layout than its input's.
"""

from __future__ import annotations

from typing import Any

import torch

from genai_fast.backends import is_batched
from genai_fast.fusion.operands import Convolution, memory_format


class _Relaid(torch.autograd.Function):
    """x in a layout; its gradient in x's own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wanted: torch.memory_format) -> torch.Tensor:
        ctx.given = memory_format(x)
        return x.view_as(x) if ctx.given is wanted else x.contiguous(memory_format=wanted)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (grad if is_batched(grad) else grad.contiguous(memory_format=ctx.given)), None


def relaid(x: torch.Tensor, wanted: torch.memory_format) -> torch.Tensor:
    """x in that layout, with its gradient in x's."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Relaid.apply(x, wanted)
    return x if memory_format(x) is wanted else x.contiguous(memory_format=wanted)


def guarded(x: torch.Tensor) -> torch.Tensor:
    """x, for what gives its gradient in a layout of its own."""
    return relaid(x, memory_format(x))


def of_result(conv: Convolution, given: torch.memory_format) -> torch.memory_format:
    """The layout of PyTorch's result: channels_last if input or weight is."""
    return torch.channels_last if given is torch.channels_last else memory_format(conv.weight)
