"""What a call does, watched and written down as a plan: a Python function of its allocations, views and kernels alone.

A launcher's code depends on sizes, strides, dtypes, alignments and numbers, so what it did for some arguments it does
for all of their signature. What a Recorder does not know, or what looks at a tensor's values, makes no plan.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# What makes tensors of tensors, in a way that is the same for all values.
_MAKES = """
    empty empty_like empty_strided new_empty zeros zeros_like new_zeros zero_ full ones randint copy_ clone contiguous
    to float view view_as reshape flatten unflatten unsqueeze squeeze transpose t permute movedim expand detach unbind
    stack select narrow chunk split __getitem__ sum sqrt rsqrt neg __neg__ add __add__ __radd__ mul __mul__ __rmul__
    linear pad mm matmul clamp T mT
"""
# What tells of a tensor, and not of its values.
_TELLS = """
    size stride dim numel element_size is_contiguous is_floating_point get_device is_neg _is_zerotensor __len__ shape
    dtype device layout is_cuda is_cpu requires_grad is_nested ndim promote_types _set_grad_enabled
"""
_MAKING, _TELLING = frozenset(_MAKES.split()), frozenset(_TELLS.split())
_MAY_BE_GIVEN = frozenset(("contiguous", "to", "float", "flatten", "reshape"))  # what they were called with
_MADE_EMPTY = frozenset(("empty", "empty_like", "empty_strided", "new_empty"))

_here = threading.local()  # .recorder: the one that watches this thread
_one_at_a_time = threading.RLock()  # Triton's class is changed while one watches
_STREAM = object()


class Plan:
    """`run(arguments, named)` does what the recorded call did; it may only be asked while `holds()`."""

    def __init__(self, run: Callable[[Any, Any], Any], reads: list[tuple[Callable[[], Any], Any]]) -> None:
        self.run, self.reads = run, reads

    def holds(self) -> bool:
        """Whether what the recorded call read besides its arguments is still the same."""
        return all([read() == value for read, value in self.reads])


def reads(read: Callable[[], Any]) -> Any:
    """The value of a setting of the process, as a launcher reads it: a plan holds while it stays the same."""
    value, recorder = read(), watching()
    if recorder is not None:
        recorder.reads.append((read, value))
    return value


def as_step(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), one step of a plan: PyTorch's own kernels, whose launches are not recorded."""
    recorder = watching()
    if recorder is None:
        return function(*arguments)
    with recorder.unwatched():
        result = function(*arguments)
    recorder.launches += 1
    recorder.step(function, arguments, result)
    return result


def unwatched() -> contextlib.AbstractContextManager[None]:
    """Inside, nothing is noted: what happens there happens in the first call alone."""
    recorder = watching()
    return contextlib.nullcontext() if recorder is None else recorder.unwatched()


def watching() -> Recorder | None:
    """The recorder that watches this thread, or None."""
    return getattr(_here, "recorder", None)


class Recorder(TorchFunctionMode):
    """Inside the block, notes each tensor that is made and each kernel that is launched.

    Args:
        given: expression -> tensor: how the plan finds its arguments, as in a[0] or n["bias"].
    """

    def __init__(self, given: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.refusal = ""  # why there is no plan
        self.launches = 0
        self.reads: list[tuple[Callable[[], Any], Any]] = []
        self._lines = ["pass"]
        self._constants: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        self._alive: list[Any] = []  # so that no two tensors have had one id
        self._grad, self._autocast = torch.is_grad_enabled(), _autocast()
        for expression, x in given.items():
            self._name(x, expression)

    def __enter__(self) -> Recorder:
        self._before, _here.recorder = watching(), self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _here.recorder = self._before

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """What happens inside is noted by the caller, as one step."""
        _here.recorder = None
        try:
            yield
        finally:
            _here.recorder = self

    def refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        result = function(*arguments, **named)
        if watching() is not self or self.refusal:
            return result
        name = getattr(function, "__name__", "")
        if name == "data_ptr":
            return Address(result, f"{self._expression(arguments[0])}.data_ptr()")
        self._note(function.__self__.__name__ if name == "__get__" else name, function, arguments, named, result)
        return result

    def _note(self, name: str, function: Any, arguments: Any, named: Any, result: Any) -> None:
        if not any(True for _ in _tensors(result)):
            if name not in _TELLING:
                self.refuse(f"{name} may tell values")
        elif name not in _MAKING or (name == "__getitem__" and any(True for _ in _tensors(arguments[1]))):
            self.refuse(f"{name} may make what values say")
        elif name in _MAY_BE_GIVEN and id(result) in self._names:
            return
        elif name in _MADE_EMPTY and result.layout is torch.strided and result.device.type in _ALLOCATORS:
            allocate = _ALLOCATORS[result.device.type]
            self.step(allocate, (tuple(result.shape), result.stride(), result.dtype), result)
            if result.requires_grad:
                self.refuse("memory requires gradients")
        else:
            self.step(function, arguments, result, named)

    def step(self, function: Callable[..., Any], arguments: Any, result: Any, named: Any = None) -> None:
        """Note result = function(*arguments, **named)."""
        involved = [*_tensors(arguments), *_tensors(list((named or {}).values()))]
        switched = torch.is_grad_enabled() is not self._grad and function is not torch.Tensor.detach
        if switched and any(x.requires_grad for x in involved):
            self.refuse("gradients are switched on or off")
        if _autocast() != self._autocast:
            self.refuse("autocast is switched on or off")
        given = [self._expression(x) for x in arguments]
        given += [f"{name}={self._expression(x)}" for name, x in (named or {}).items()]
        name = f"r{len(self._lines)}"
        self._lines.append(f"{name} = {self._constant(function)}({', '.join(given)})")
        self._name(result, name)

    def part(self, plan: Plan | None, function: Any, arguments: Any, result: Any) -> None:
        """Note result = function(*arguments), which does what that plan says. Without one the whole has none either."""
        if plan is None:
            self.refuse("a part has no plan")
            return
        self.launches += 1
        self.reads += plan.reads
        self.step(function, arguments, result)

    def launched(self, kernel: Any, arguments: Any, options: Any, grid: Any, compiled: Any) -> None:
        """Note kernel[grid](*arguments, **options) and what Triton compiled for it."""
        self.launches += 1
        known = compiled is not None and isinstance(grid, tuple) and not kernel.pre_run_hooks
        direct = _direct(compiled, (*grid, 1, 1)[:3]) if known else None
        if direct is None:
            self.step(_original_run, (kernel, *arguments), None, {**options, "grid": grid, "warmup": False})
            return
        launch, head, in_a_tuple = direct
        self._constant(compiled)  # kept as long as its function is
        if "stream = " not in self._lines[0]:
            driver = sys.modules["triton.runtime.driver"].driver.active
            stream = self._constant(driver.get_current_stream)
            self._lines[0] = f"stream = {stream}({driver.get_current_device()})"
        values = {p.name: p.default for p in kernel.params if p.has_default} | options
        values |= dict(zip(kernel.arg_names, arguments, strict=False))
        given = [self._address(values[name]) for name in kernel.arg_names]
        rest = f"({', '.join(given)},)" if in_a_tuple else ", ".join(given)
        before = ", ".join("stream" if x is _STREAM else self._expression(x) for x in head)
        self._lines.append(f"{self._constant(launch)}({before}, {rest})")

    def called(self, kernel: Callable[..., Any], arguments: Any, threads: Callable[[], int]) -> None:
        """Note kernel(*arguments, threads()), of a kernel in C++."""
        self.launches += 1
        if any(x.__class__ is int and abs(x) >= 1 << 32 for x in arguments):
            self.refuse("a number may be the address of what is no tensor")
        given = ", ".join(self._address(x) for x in arguments)
        self._lines.append(f"{self._constant(kernel)}({given}, {self._constant(threads)}())")

    def _address(self, value: Any) -> str:
        if isinstance(value, Address):
            return value.expression
        return f"{self._expression(value)}.data_ptr()" if isinstance(value, torch.Tensor) else self._expression(value)

    def plan(self, result: Any) -> Plan | None:
        """The plan that returns what the recorded call did, or None if there is none."""
        returned = self._expression(result)
        if not self.launches and not self.refusal:
            self.refuse("nothing is launched")
        if self.refusal:
            return None
        body = "\n    ".join([*self._lines, f"return {returned}"])
        exec(f"def run(a, n):\n    {body}\n", self._constants)
        return Plan(self._constants["run"], self.reads)

    def _name(self, value: Any, name: str) -> None:
        """From now on that is how the plan calls these tensors."""
        if isinstance(value, torch.Tensor):
            self._names[id(value)] = name
            self._alive.append(value)
        elif isinstance(value, (list, tuple)):
            for k, x in enumerate(value):
                self._name(x, f"{name}[{k}]")

    def _expression(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            if id(value) not in self._names:
                self.refuse("a tensor comes from elsewhere")
            return self._names.get(id(value), "None")
        if value.__class__ in (list, tuple) and any(True for _ in _tensors(value)):
            inside = ", ".join(self._expression(x) for x in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside},)"
        if value is None or value.__class__ in (bool, int, str) or (value.__class__ is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, tuple) and any(True for _ in _tensors(value)):  # a named one
            return f"{self._constant(value.__class__)}({', '.join(self._expression(x) for x in value)})"
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        for name, known in self._constants.items():
            if known is value:
                return name
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name


class Numbers(int):
    """Where integers lie that no tensor holds; they live as long as it."""

    def __new__(cls, values: Iterable[int]) -> Numbers:
        kept = array("q", values)
        made = super().__new__(cls, kept.buffer_info()[0])
        made._kept = kept  # type: ignore[attr-defined]
        return made


class Address(int):
    """Where a tensor's data lie, and how a plan finds that. Whoever computes with it has no plan."""

    expression: str

    def __new__(cls, value: int, expression: str) -> Address:
        made = super().__new__(cls, value)
        made.expression = expression
        return made


def _refused(name: str) -> Callable[..., Any]:
    of_int = getattr(int, name)

    def method(self: Address, *other: Any) -> Any:
        recorder = watching()
        if recorder is not None:
            recorder.refuse("an address is computed with")
        return of_int(self, *other)

    return method


_COMPUTING = "eq ne lt le gt ge hash add radd sub rsub mul rmul floordiv mod and rand or xor lshift rshift neg int"
for _name in _COMPUTING.split():
    setattr(Address, f"__{_name}__", _refused(f"__{_name}__"))


def _autocast() -> tuple[bool, bool]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from _tensors(x)


def _allocators() -> dict[str, Callable[..., torch.Tensor]]:
    """By device type: what compiled programs allocate with, an empty_strided that parses no arguments."""
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    slower = {d: lambda *a, device=d: torch.empty_strided(*a[:2], dtype=a[2], device=device) for d in ("cpu", "cuda")}
    return {device: getattr(guards, f"_empty_strided_{device}", other) for device, other in slower.items()}


_ALLOCATORS = _allocators()


def _original_run(kernel: Any, *arguments: Any, **options: Any) -> Any:
    """Triton's own launch."""
    return kernel.run(*arguments, **options)


def _direct(compiled: Any, grid: tuple[int, ...]) -> tuple[Any, tuple[Any, ...], bool] | None:
    """(Triton's launcher in C, what it takes before the kernel's arguments, whether these come as one tuple).

    None for what is not known to launch so: a Triton of another version, or a kernel that needs scratch memory.
    """
    launcher, version = compiled.run, sys.modules["triton"].__version__.split(".")[:2]
    kind = f"{launcher.__class__.__module__}.{launcher.__class__.__name__}"
    if kind != "triton.backends.nvidia.driver.CudaLauncher":
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    head = (*grid, _STREAM, compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    scratch, metadata = (None, None), compiled.packed_metadata
    hooks = (None, None, None)  # and their metadata: with a hook no plan is asked
    if version == ["3", "6"]:
        return launcher.launch, (*head, *scratch, metadata, *hooks), False
    if version == ["3", "7"]:
        signature = launcher.arg_annotations, launcher.kernel_signature
        return launcher.launch, (*head, metadata, *hooks, *scratch, *signature), True
    return None


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder | None]:
    """Watch what happens inside; None if another thread is being watched."""
    if not _one_at_a_time.acquire(blocking=False):
        yield None
        return
    try:
        with _launches_reported(), recorder:
            yield recorder
    finally:
        _one_at_a_time.release()


@contextlib.contextmanager
def _launches_reported() -> Iterator[None]:
    """Inside, every launch of a thread that is watched is noted."""
    jit = sys.modules.get("triton.runtime.jit")
    run = getattr(getattr(jit, "JITFunction", None), "run", None)
    if run is None or hasattr(run, "reports"):  # nothing is launched, or one recorder is inside another
        yield
        return

    def report(kernel: Any, *arguments: Any, grid: Any = None, warmup: bool = False, **options: Any) -> Any:
        with torch._C.DisableTorchFunction():  # it reads addresses
            compiled = run(kernel, *arguments, grid=grid, warmup=warmup, **options)
        recorder = watching()
        if recorder is not None and not warmup:
            recorder.launched(kernel, arguments, options, grid, compiled)
        return compiled

    report.reports = True  # type: ignore[attr-defined]
    jit.JITFunction.run = report  # type: ignore[union-attr]
    try:
        yield
    finally:
        jit.JITFunction.run = run  # type: ignore[union-attr]
