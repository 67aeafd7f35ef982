"""Which calls are served by a plan: ordinary ones, of a signature that has come before."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch.autograd import forward_ad

from genai_fast.backends import forced_backend
from genai_fast.kernels.common import launch, plans
from genai_fast.kernels.common.recorder import watching

P = ParamSpec("P")
R = TypeVar("R")

_NUMBERS = {int, float, bool, str, NoneType}


def signature(arguments: Sequence[Any], named: dict[str, Any], recorders: int = 0) -> Any:
    """What a plan for these arguments depends on; None if the call must take the whole way.

    Numbers and names count by their value, tensors by all but theirs.

    Args:
        recorders: how many recorders watch this thread.
    """
    parts: list[Any] = []
    tensors: list[int] = []
    where = None
    try:
        for x in (*arguments, *named.values()) if named else arguments:
            kind = x.__class__
            if kind is torch.Tensor or kind is torch.nn.Parameter:
                if where is None:
                    where = _circumstances(x, recorders)
                    if where is None:
                        return None
                    parts.append(where)
                address = x.data_ptr()
                if not address or x.is_neg():
                    return None
                parts += x.shape, x.stride(), x.dtype, x.get_device(), x.requires_grad, address & 15
                tensors.append(id(x))
            elif kind in _NUMBERS:
                if kind is float and x == 0.0 and math.copysign(1.0, x) < 0.0:
                    return None  # equal to 0.0, and not the same
                parts += kind, x
            elif kind is tuple and all([y.__class__ is int for y in x]):
                parts += kind, x
            else:
                return None
    except RuntimeError:  # no strides or no memory: of sparse, nested and batched tensors
        return None
    if where is None:
        return None
    if named:
        parts.append(tuple(named))
    if len(set(tensors)) != len(tensors):  # a plan may take one of those that are the same for the other
        parts.append(tuple(map(tensors.index, tensors)))
    return tuple(parts)


def _circumstances(x: torch.Tensor, recorders: int) -> Any:
    """What else a plan depends on, with x the first of the tensors; None where somebody listens to single steps."""
    backend, kind, compiled = forced_backend(), "cpu", True
    if x.is_cuda:
        device, kind = torch._C._cuda_getDevice(), "cuda"
        if x.get_device() != device:  # launched there by a change of the device
            return None
    elif not x.is_cpu:
        return None
    elif launch.emulated is not None:
        if not launch.emulated.plans:
            return None
        device = launch.emulated.current_device()
    elif backend == "triton":  # interpreted
        return None
    else:
        device, compiled = -1, False
    if (
        plans.looked_at
        or torch._C._len_torch_function_stack() != recorders
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or (compiled and _hooked())
    ):
        return None
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return backend, device, autocast, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@functools.cache
def _triton_settings() -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("triton.knobs").runtime


def _hooked() -> bool:
    """Whether a profiler or a test has asked Triton to be told of launches, or to compile in another way."""
    settings = _triton_settings()
    if settings is None:
        return True
    enter, leave = settings.launch_enter_hook, settings.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or settings.debug
        or settings.jit_cache_hook
        or settings.add_stages_inspection_hook
    )


def given(arguments: Sequence[Any], named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """How a plan finds each tensor."""
    found = {f"a[{k}]": x for k, x in enumerate(arguments)} | {f"n[{name!r}]": x for name, x in named.items()}
    return {expression: x for expression, x in found.items() if isinstance(x, torch.Tensor)}


def unrecorded(check: Callable[..., None], *arguments: Any) -> None:
    """check(*arguments), which is no part of a plan: `planned_with` calls it before each run of one."""
    recorder = watching()
    with contextlib.nullcontext() if recorder is None else recorder.unwatched():
        check(*arguments)


def planned(function: Callable[P, R]) -> Callable[P, R]:
    """The public op, by a plan where there is one. Its checks run when the plan is made."""
    return _planned(None, function)


def planned_with(check: Callable[..., None]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`planned`, and check(*arguments, **named) before a plan runs, of what no signature tells.

    The op itself calls it by `unrecorded`, after its other checks.
    """
    return functools.partial(_planned, check)


def _planned(check: Callable[..., None] | None, function: Callable[P, R]) -> Callable[P, R]:
    book = plans.Book()

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*arguments, **named)
        key = signature(arguments, named)
        if key is None:
            return function(*arguments, **named)
        plan = book.find(key)
        if plan is not None:
            if check is not None:
                check(*arguments, **named)
            return plan.run(arguments, named)
        return book.call(key, functools.partial(function, *arguments, **named), given(arguments, named))

    return cast(Callable[P, R], call)
