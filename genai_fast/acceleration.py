"""accelerate(model): all that this package offers a model in one call, which says what each part is worth."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from genai_fast import cpu, sdpa
from genai_fast.ops import checks
from genai_fast.swap import fuse, undisturbed

_ROUNDS = 5
_SECONDS = 0.2  # of calls in each half of a round, at least one
_WORSE = 0.98  # a ratio below this is no noise


class Part(NamedTuple):
    """What was tried: its name, whether it was kept, its ratio on the example (None: not measured), and why not."""

    name: str
    kept: bool
    ratio: float | None
    reason: str

    def __str__(self) -> str:
        said = "kept" if self.kept else "left out"
        worth = "" if self.ratio is None else f", {self.ratio:.2f} x as fast"
        return f"{self.name:14}  {said}{worth}{f': {self.reason}' if self.reason else ''}"


class Acceleration(contextlib.AbstractContextManager):
    """What `accelerate` did, in words by str(); `remove()` undoes it, and so does the end of a `with` block.

    Attributes:
        parts: what was tried, in order; each ratio is beside the parts kept before it.
        ratio: of all that was kept beside the plain model on the example; None without one.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.ratio: float | None = None
        self._undo: list[Callable[[], Any]] = []

    def remove(self) -> None:
        """Everything as it was before. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __str__(self) -> str:
        whole = [] if self.ratio is None else [f"{'together':14}  {self.ratio:.2f} x as fast on the example"]
        return "\n".join([*map(str, self.parts), *whole])


def accelerate(model: nn.Module, example_input: Any = None, *, random: bool = True) -> Acceleration:
    """Fuse a model in place and switch on what speeds up its surroundings: on a CPU its matrix products and memory.

    In order: `fuse`, `enable_sdpa`, on a CPU `tune_cpu`, and channels_last weights of two-dimensional convolutions.
    With an example each is measured against the parts before it, by forward, and backward if gradients are on, in the
    model's current mode and contexts, and left out if the model is slower with it; the model runs some dozens of times.
    Buffers, random state and gradients stay as they are. Without an example nothing is measured, and the layout of
    weights stays.

    Args:
        model: any module, before DistributedDataParallel, fully_shard or torch.compile.
        example_input: a tensor, or a tuple of positional arguments, of the size that counts.
        random: as of `fuse`.

    Returns: What was done: print it; `.remove()` undoes it. `enable_sdpa` and `tune_cpu` are for the whole process.
    Raises TypeError: as for `fuse`. With an example, whatever the model raises; everything is then as before.
    """
    random = checks.flag("accelerate", "random", random)
    done = Acceleration()
    devices = {p.device.type for p in model.parameters()} if isinstance(model, nn.Module) else set()
    parts: dict[str, Callable[[], Callable[[], Any]]] = {
        "fuse": lambda: _fused(model, random),
        "enable_sdpa": lambda: _switched(sdpa.enable_sdpa, sdpa.active),
    }
    if devices <= {"cpu"}:
        parts["tune_cpu"] = lambda: _switched(cpu.tune_cpu, cpu.active)
    if example_input is not None and _convolves(model):
        parts["channels_last"] = lambda: _channels_last(model)
    call = None if example_input is None else _step(model, example_input)
    undisturbed_model = contextlib.nullcontext() if call is None else undisturbed(model)
    try:
        with undisturbed_model:
            for name, apply in parts.items():
                _try(done, name, apply, call)
            kept = [parts[part.name] for part in done.parts if part.kept]
            if call is not None and kept:
                done.remove()
                done.ratio, done._undo = _ratio(lambda: [apply() for apply in kept], call)
    except BaseException:
        done.remove()
        raise
    return done


def _try(done: Acceleration, name: str, apply: Callable[[], Callable[[], Any]], call: Callable[[], Any] | None) -> None:
    if call is not None and name == "enable_sdpa" and not _attends(call):
        done.parts.append(Part(name, False, None, "the model does not call scaled_dot_product_attention"))
        return
    try:
        if call is None:
            done._undo.append(apply())
            done.parts.append(Part(name, True, None, ""))
            return
        ratio, undo = _ratio(lambda: [apply()], call)
    except RuntimeError as error:
        if name != "enable_sdpa":
            raise
        done.parts.append(Part(name, False, None, str(error)))
        return
    kept = ratio >= _WORSE
    if kept:
        done._undo += undo
    else:
        for step in reversed(undo):
            step()
    done.parts.append(Part(name, kept, ratio, "" if kept else "slower on the example"))


def _ratio(
    apply: Callable[[], list[Callable[[], Any]]], call: Callable[[], Any]
) -> tuple[float, list[Callable[[], Any]]]:
    """Time without over time with it, in turn; it is applied afterwards: and how to undo it."""
    ratios = []
    undo = apply()
    try:
        call()  # what is chosen or compiled at a first call
        for k in range(_ROUNDS):
            fast = _time(call)
            for step in reversed(undo):
                step()
            undo = []
            if k == 0:
                call()
            ratios.append(_time(call) / fast)
            undo = apply()
            call()
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return statistics.median(ratios), undo


def _time(call: Callable[[], Any]) -> float:
    """Seconds a call, the fastest."""
    best, start = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() < start + _SECONDS:
        before = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - before)
    return best


def _step(model: nn.Module, example_input: Any) -> Callable[[], Any]:
    """Forward, and backward if it has any."""
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)

    def call() -> None:
        results = [x for x in _pytree.tree_leaves(model(*arguments)) if isinstance(x, torch.Tensor) and x.requires_grad]
        leaves = [p for p in model.parameters() if p.requires_grad]
        if results and leaves:
            torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results], allow_unused=True)
        if any(p.is_cuda for p in leaves):
            torch.cuda.synchronize()

    return call


class _Names(TorchDispatchMode):
    """Keeps the names of the operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(str(func))
        return func(*args, **(kwargs or {}))


def _attends(call: Callable[[], Any]) -> bool:
    with _Names() as names:
        call()
    return any("scaled_dot_product" in name or "native_multi_head_attention" in name for name in names.found)


def _fused(model: nn.Module, random: bool) -> Callable[[], Any]:
    before = {module: type(module) for module in model.modules()} if isinstance(model, nn.Module) else {}
    fuse(model, random=random)

    def undo() -> None:
        for module, cls in before.items():  # which may have been fused already
            object.__setattr__(module, "__class__", cls)

    return undo


def _switched(on: Callable[[], Any], active: Callable[[], Any]) -> Callable[[], Any]:
    """Turns a switch of the process on; what was on before stays so."""
    return (lambda: None) if active() is not None else on().remove


def _convolves(model: nn.Module) -> bool:
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    return any(isinstance(m, kinds) and isinstance(m._parameters.get("weight"), nn.Parameter) for m in model.modules())


def _channels_last(model: nn.Module) -> Callable[[], Any]:
    planes = [p for p in model.parameters() if p.dim() == 4 and p.is_contiguous()]
    strides = [p.stride() for p in planes]
    for p in planes:
        p.data = p.data.contiguous(memory_format=torch.channels_last)

    def undo() -> None:
        for p, stride in zip(planes, strides, strict=True):  # what has changed since is kept
            p.data = torch.empty_strided(p.shape, stride, dtype=p.dtype, device=p.device).copy_(p.data)

    return undo
