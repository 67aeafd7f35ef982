"""Memory layouts within a container: an implementation may use another one, which nothing outside it sees.

What leaves a chain, and the gradients that reach what was given to it, lie in memory as PyTorch would have them at that
place. It is more than courtesy: `x.view` raises on another layout, and the backward of PyTorch's instance norm computes
wrong numbers from a gradient in another layout than its input's.
"""

import itertools
from typing import Any

import torch
from torch._prims_common import make_contiguous_strides_for, suggest_memory_format

from genai_fast.backends import is_batched
from genai_fast.fusion.operands import Chain, Convolution, memory_format


class _Relaid(torch.autograd.Function):
    """x in a layout; its gradient in x's own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wanted: torch.memory_format) -> torch.Tensor:
        ctx.given = memory_format(x)
        return x.view_as(x) if ctx.given is wanted else _moved(x, wanted)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (grad if is_batched(grad) else grad.contiguous(memory_format=ctx.given)), None


def _moved(x: torch.Tensor, wanted: torch.memory_format) -> torch.Tensor:
    """A copy of x in another layout: of a 1 x 1 plane too, whose strides alone tell torch's convolutions the layout."""
    return torch.empty_like(x, memory_format=wanted).copy_(x)


def relaid(x: torch.Tensor, wanted: torch.memory_format) -> torch.Tensor:
    """x in that layout, with its gradient in x's."""
    if memory_format(x) is wanted:
        return x  # and no view of it: a program may change in place what a container returns
    return _Relaid.apply(x, wanted) if torch.is_grad_enabled() and x.requires_grad else _moved(x, wanted)


def guarded(x: torch.Tensor) -> torch.Tensor:
    """x, for what gives its gradient in a layout of its own."""
    return _Relaid.apply(x, memory_format(x)) if torch.is_grad_enabled() and x.requires_grad else x


def for_norm(x: torch.Tensor) -> torch.Tensor:
    """x [N, C, ...] in the layout of PyTorch's batch norm of it, which the op's result takes over from its input."""
    if x.dim() not in (3, 4, 5) or torch.compiler.is_compiling():
        return x
    if x.is_contiguous():  # and of one channel or position perhaps channels_last too: then PyTorch's is not
        strides = make_contiguous_strides_for(x.shape) if x.stride(1) == 1 else x.stride()
        return x if x.stride() == strides else x.as_strided(x.shape, strides)
    if x.dim() == 3:
        return x.contiguous()  # sequences have no channels_last
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if x.is_contiguous(memory_format=last):
        return x
    return x.contiguous(memory_format=suggest_memory_format(x))


def keeps_order(x: torch.Tensor) -> bool:
    """Whether an op's result lies as PyTorch's of an element by itself: of a transposed x PyTorch's is transposed."""
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1 and stride]
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    rows = all(a >= b for a, b in itertools.pairwise(strides))
    return rows or (last is not None and x.is_contiguous(memory_format=last))


def dense_order(x: torch.Tensor) -> list[int] | None:
    """The order of dimensions in which x is contiguous, if that leaves the last one last; else None."""
    order = [*sorted(range(x.dim() - 1), key=x.stride, reverse=True), x.dim() - 1]
    return order if x.permute(order).is_contiguous() else None


def of_result(conv: Convolution, given: torch.memory_format) -> torch.memory_format:
    """The layout of PyTorch's result: channels_last if input or weight is."""
    return torch.channels_last if given is torch.channels_last else memory_format(conv.weight)


def of_chain(chain: Chain, y: torch.Tensor, given: torch.memory_format) -> torch.memory_format:
    """The layout of PyTorch's y: its batch norm takes one channel or position for contiguous, whatever its strides."""
    one = y.size(1) == 1 or y.size(2) == y.size(3) == 1
    return torch.contiguous_format if chain.norm is not None and one else of_result(chain.conv, given)
