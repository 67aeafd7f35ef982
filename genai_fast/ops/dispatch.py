"""Calls without what small tensors cannot afford: signature inspection, and the dispatcher if nothing listens."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from genai_fast.backends import implementation, select, survey


def transformed() -> bool:
    """Whether torch.compile or one of torch.func's transforms sees this call: values cannot be looked at then."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def observed() -> bool:
    """Whether a compiler, a transform or a dispatch mode (fake tensors, tracing) must see what is called."""
    return transformed() or bool(torch._C._len_torch_dispatch_stack())


def left_to_torch() -> bool:
    """Whether torch's own operators must be called: for torch.export, torch.func, forward derivatives, jit.trace, and
    a mode, which may count, change or record what is called and knows torch's operators alone."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return bool(
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack() or _function_mode()
    )  # fmt: skip


def _function_mode() -> bool:
    """Whether a mode sees the functions that are called; a default device is not meant."""
    if not (count := torch._C._len_torch_function_stack()):
        return False
    return any(not isinstance(torch._C._get_function_stack_at(k), DeviceContext) for k in range(count))


def readable(x: torch.Tensor) -> bool:
    """Whether x's values can be looked at for nothing: no waiting for a device, no break of a graph."""
    return not observed() and x.is_cpu and x.numel() > 0 and not survey((x,))[2]


def differentiated_again() -> bool:
    """Whether a backward is itself recorded; then it is made of plain PyTorch. torch.compile refuses those."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def library_call(name: str, *arguments: Any) -> Any:
    """torch.ops.genai_fast.<name>; straight to the implementation if the dispatcher would do nothing (10 us).

    It has work to do for a compiler, a transform, a dispatch mode and special tensors.

    Args:
        arguments: of the library op; the last one is the backend.
    """
    if not observed():
        device, dtype, special = survey(arguments)
        if not special:
            return select(name, arguments[-1], device, dtype)(*arguments[:-1])
    return getattr(torch.ops.genai_fast, name)(*arguments)


def backward_call(name: str, *arguments: Any) -> Any:
    """`library_call` in a backward: by the differentiable reference if the result is differentiated again."""
    if differentiated_again():
        return implementation(name, "reference")(*arguments[:-1])
    return library_call(name, *arguments)


def needs_graph(arguments: Iterable[Any]) -> bool:
    """Whether autograd records what is made of these arguments."""
    if torch.is_grad_enabled():
        for x in arguments:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                return True
    return False


class KernelFunction(torch.autograd.Function):
    """A Function with a static setup_context; `call` takes forward's arguments by position, all of them.

    A subclass's backward gives gradients by the names of forward's parameters; those that it leaves out are None.
    """

    def __init_subclass__(cls) -> None:
        nothing = dict.fromkeys(inspect.signature(cls.forward).parameters)
        by_name = cls.backward

        def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            found = {**nothing, **by_name(ctx, *upstream)}.values()
            return tuple([g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True)])

        setattr(cls, "backward", staticmethod(backward))  # noqa: B010  (mypy takes no assignment to a method)

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        # `apply` binds arguments to forward's signature on every call (20 us). Neither torch.func's transforms nor
        # torch.compile can do without it; everything else can start where it ends, or at forward if nothing is kept.
        if transformed():
            return cls.apply(*_once_each(arguments))
        if forward_ad._current_level >= 0 or needs_graph(arguments):
            return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]  # from C++
        return cls.forward(*arguments)


def _once_each(arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments with an alias for a tensor that is given again: torch.compile refuses a Function the same twice."""
    seen: list[torch.Tensor] = []
    result = []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            if any(x is other for other in seen):
                x = x.view_as(x)
            seen.append(x)
        result.append(x)
    return result
