"""Calls without what small tensors cannot afford: signature inspection, and the dispatcher if nothing listens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from genai_fast.backends import implementation, select, survey
from genai_fast.kernels.common.activations import output_gives_derivative
from genai_fast.kernels.common.plans import Book
from genai_fast.kernels.common.recorder import Plan, Recorder, watching
from genai_fast.ops.planned import given, signature


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
    """torch.ops.genai_fast.<name>; by a plan if there is one, else straight to the implementation if the dispatcher
    would do nothing (10 us).

    It has work to do for a compiler, a transform, a dispatch mode and special tensors.

    Args:
        arguments: of the library op; the last one is the backend.
    """
    backend = arguments[-1]
    if backend.__class__ is Prepared:
        return backend.call(name, arguments)
    recorder = None if torch.compiler.is_compiling() else watching()
    if recorder is not None:
        with recorder.unwatched():
            result, plan = _part(name, arguments)
        recorder.part(plan, plan and plan.run, (arguments, None), result)
        return result
    key = None if torch.compiler.is_compiling() else signature(arguments, {})
    if key is None:
        return _serve(name, arguments)
    plan = _book(name).find(key)
    if plan is not None:
        return plan.run(arguments, None)
    return _book(name).call(key, functools.partial(_serve, name, arguments), given(arguments, {}))


def _serve(name: str, arguments: Sequence[Any]) -> Any:
    """The library op the whole way."""
    if not observed():
        device, dtype, special = survey(arguments)
        if not special:
            return select(name, arguments[-1], device, dtype)(*arguments[:-1])
    return getattr(torch.ops.genai_fast, name)(*arguments)


@functools.cache
def _book(name: str) -> Book:
    return Book()


def _part(name: str, arguments: Sequence[Any]) -> tuple[Any, Plan | None]:
    """What a library op gives, and its plan if it has one; for the plan of the op that calls it."""
    key = signature(arguments, {}, recorders=1)
    if key is None:
        return _serve(name, arguments), None
    plan = _book(name).find(key)
    if plan is not None:
        return plan.run(arguments, None), plan
    return _book(name).record(key, functools.partial(_serve, name, arguments), given(arguments, {}))


class Prepared(str):
    """A backend's name, with the plan of the one library op that a Function's forward calls on it."""

    plan: Plan | None = None
    calls = 0  # while it is recorded
    ready = False

    def call(self, name: str, arguments: Sequence[Any]) -> Any:
        """The library op."""
        if self.ready:
            return self.plan.run(arguments, None)  # type: ignore[union-attr]  # there is one
        self.calls += 1
        result, self.plan = _part(name, (*arguments[:-1], str(self)))
        return result


def _recorded(recorder: Recorder, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """function(*arguments), a Function's `apply` or its forward, as one step of the plan that is being recorded."""
    prepared = Prepared(arguments[-1])
    arguments = (*arguments[:-1], prepared)
    with recorder.unwatched():
        result = function(*arguments)
    prepared.ready = prepared.calls == 1 and prepared.plan is not None
    recorder.part(prepared.plan if prepared.ready else None, function, arguments, result)
    return result


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


def beside_input(
    residual: torch.Tensor | None, y: torch.Tensor, activation: str, slope: float
) -> tuple[torch.Tensor | None, bool]:
    """What the backward of y = activate(norm(x) + residual) keeps besides x, and whether it is y.

    y is what PyTorch keeps too, so that a program may change the residual afterwards. None without a residual, or if
    the derivative is 1.
    """
    if residual is None or activation == "none":
        return None, False
    from_output = output_gives_derivative(activation, slope)
    return (y if from_output else residual), from_output


class KernelFunction(torch.autograd.Function):
    """A Function with a static setup_context; `call` takes forward's arguments by position, all of them.

    A subclass's backward gives gradients by the names of forward's parameters; those that it leaves out are None.
    """

    def __init_subclass__(cls) -> None:
        nothing = dict.fromkeys(inspect.signature(cls.forward).parameters)
        by_name = cls.backward

        def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            if getattr(ctx, "backend", None).__class__ is Prepared:
                ctx.backend = str(ctx.backend)  # its plan is the forward's
            found = {**nothing, **by_name(ctx, *upstream)}.values()
            return tuple([g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True)])

        setattr(cls, "backward", staticmethod(backward))  # noqa: B010  (mypy takes no assignment to a method)

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        # `apply` binds arguments to forward's signature on every call (20 us). Neither torch.func's transforms nor
        # torch.compile can do without it; everything else can start where it ends, or at forward if nothing is kept.
        if transformed():
            return cls.apply(*_once_each(arguments))
        kept = forward_ad._current_level >= 0 or needs_graph(arguments)
        function = super(torch.autograd.Function, cls).apply if kept else cls.forward  # type: ignore[misc]  # from C++
        recorder = watching()
        return function(*arguments) if recorder is None else _recorded(recorder, function, arguments)


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
