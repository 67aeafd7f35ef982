"""Which implementation serves a call: C++ on the CPU, Triton on CUDA, plain PyTorch everywhere else."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from genai_fast.kernels.common import launch, plans
from genai_fast.kernels.common.extension import cpu_kernels, extension, interpreting
from genai_fast.kernels.common.recorder import watching
from genai_fast.registry import FOLDERS, LIBRARIES
from genai_fast.scoped import Scoped

__all__ = [
    "BACKENDS", "FallbackWarning", "choose", "choose_anew", "cpu_kernels", "extension", "forced_backend",
    "implementation", "interpreting", "is_plain", "mapped_openmp", "select", "survey", "unavailable", "use_backend",
    "written",
]  # fmt: skip

BACKENDS = ("reference", "cpu", "triton")

# By library op: what takes its Triton kernel and the arguments, and may give a call to a faster implementation of
# PyTorch's; not where a backend was asked for by name.
PEERS: dict[str, Callable[..., Any]] = {}

_forced = Scoped("genai_fast.use_backend", "")


class FallbackWarning(UserWarning):
    """A call runs on the plain PyTorch reference where a fused kernel was expected."""


class use_backend:
    """Serve every op by one backend from now on, in the whole process; as a context manager, inside the block.

    A thread that has chosen a backend itself keeps its choice, and the end of its block undoes that alone. A backward
    runs on the backend that its forward was called under. An explicit choice raises if it cannot serve; the automatic
    one (`use_backend(None)`, the default) falls back to the reference and says so once.

    Args:
        name: "triton", "cpu", "reference", or None for the automatic choice.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None and name not in BACKENDS:
            raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)} or None, got {name!r}")
        self._block = _forced.enter(name or "")

    def __enter__(self) -> None:
        self._block.open = True

    def __exit__(self, *exception: object) -> None:
        _forced.leave(self._block)


def forced_backend() -> str:
    """The backend that use_backend chose, or "" for the automatic choice."""
    return _forced.get()


@functools.cache
def unavailable(backend: str, device: str) -> str:
    """Why `backend` cannot serve tensors on this type of device; "" if it can."""
    if backend == "reference":
        return ""
    if backend == "cpu":
        return f"the C++ kernels serve CPU tensors, not {device}" if device != "cpu" else extension()[1]
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; remedy: pip install triton (Linux only)"
    if device == "cpu":
        if interpreting() or launch.emulated is not None:
            return ""
        return (
            "Triton needs a CUDA device; set TRITON_INTERPRET=1 to interpret it on the CPU, or run it compiled inside"
            " genai_fast.testing.emulated_gpu()"
        )
    if device != "cuda":
        return f"the Triton kernels serve CUDA tensors, not {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "the Triton kernels need compute capability 8.0 (Ampere) or newer"
    return ""


@functools.cache
def implementation(name: str, backend: str) -> Callable[..., Any]:
    """The function by which a backend computes a library op."""
    stem = {"reference": "reference", "cpu": "cpu_kernel", "triton": "triton_kernel"}[backend]
    function = getattr(importlib.import_module(f"genai_fast.kernels.{FOLDERS[name]}.{stem}"), name)
    return _on_its_device(function) if backend == "triton" else function


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""

    def launch(*arguments: Any) -> Any:
        device = next(x for x in arguments if isinstance(x, torch.Tensor)).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device(device):
            return function(*arguments)

    return launch


@functools.cache
def choose(name: str, forced: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The backend that serves a library op on such tensors, and why no kernel does ("" if one does).

    Raises RuntimeError: `forced` names a backend that cannot serve the call.
    """
    if device == "meta":
        return "reference", ""
    backend = forced or {"cpu": "cpu", "cuda": "triton"}.get(device, "reference")
    if backend == "reference":
        return backend, "" if forced else f"there is no kernel for {device} tensors"
    library = LIBRARIES[name]
    if backend not in library.kernels and not forced:
        return "reference", ""  # as planned: PyTorch's own is fast there
    if backend not in library.kernels:
        reason = f"it has no {backend} kernel"
    elif dtype not in library.dtypes:
        reason = f"its kernels do not take {dtype}"
    else:
        reason = unavailable(backend, device)
    if not reason:
        return backend, ""
    if forced:
        raise _cannot_serve(name, forced, reason)
    return "reference", reason


def _cannot_serve(name: str, forced: str, reason: str) -> RuntimeError:
    return RuntimeError(f"{name}: backend {forced!r} was asked for, but {reason}; remedy: use_backend(None)")


is_batched = torch._C._functorch.is_legacy_batchedtensor
_PLAIN = {torch.Tensor, torch.nn.Parameter}
_SPECIAL = (torch.Tensor.is_neg, torch.Tensor._is_zerotensor, is_batched)


def is_plain(x: Any) -> bool:
    """Whether x is a tensor or a parameter, of no subclass."""
    return x.__class__ in _PLAIN


def survey(arguments: Iterable[Any]) -> tuple[str, torch.dtype, bool]:
    """Of a library op's arguments: device type, dtype (float64 if any is), whether the dispatcher must see them.

    It must for a tensor subclass, a lazily negated tensor, one without memory (torch's ZeroTensor), and one of several
    gradients that autograd batches.
    """
    device, dtype, special = "", torch.float32, False
    for x in arguments:
        # By identity first: isinstance costs more than the rest, and small tensors feel it.
        if x.__class__ is list and x:  # a list is alike in device and dtype, but any of it may be special
            special = special or not _PLAIN.issuperset(map(type, x)) or any(any(map(test, x)) for test in _SPECIAL)
            x = x[0]
        if x.__class__ not in _PLAIN:
            if not isinstance(x, torch.Tensor):
                continue
            special = True
        if not device:  # of the first: seeds and schedules, which may lie elsewhere, come later
            device, dtype = "cpu" if x.is_cpu else x.device.type, x.dtype
        elif x.dtype is torch.float64 and x.dim():
            dtype = torch.float64
        if x.is_neg() or is_batched(x) or x._is_zerotensor():
            special = True
    return device or "cpu", dtype, special


def written(schema: str) -> list[int]:
    """Positions of the arguments that a library op updates; not of running statistics: PyTorch counts none of those."""
    arguments = schema.partition("(")[2].split(", ")
    return [k for k, x in enumerate(arguments) if "!)" in x and "running" not in x]


def _counting(name: str, function: Callable[..., Any], written: list[int]) -> Callable[..., Any]:
    """The function, and autograd told what it has changed: a backward that needs the old values has to fail."""

    def call(*arguments: Any) -> Any:
        result = function(*arguments)
        if name == "decode_attention" and arguments[4] is None:  # without new keys it only reads
            return result
        changed = [arguments[k] for k in written]
        tensors = [t for x in changed for t in (x if isinstance(x, list) else [x])]
        torch.autograd.graph.increment_version(tensors)
        if (recorder := watching()) is not None:
            recorder.step(torch.autograd.graph.increment_version, (tensors,), None)
        return result

    return call


@functools.cache
def select(name: str, forced: str, device: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The function that serves a library op on such tensors."""
    backend, reason = choose(name, forced, device, dtype)
    if reason:
        warnings.warn(f"{name} runs on the PyTorch reference: {reason}", FallbackWarning, stacklevel=8)  # once: cached
    function, refuses = implementation(name, backend), LIBRARIES[name].refuses
    if backend == "triton" and not forced and name in PEERS:
        function = functools.partial(PEERS[name], function)
    if positions := written(LIBRARIES[name].schema):
        function = _counting(name, function, positions)
    if refuses is None or backend == "reference":
        return function

    def within_limits(*arguments: Any) -> Any:
        refusal = refuses(backend, *arguments)
        if refusal and forced:
            raise _cannot_serve(name, forced, refusal)
        return (implementation(name, "reference") if refusal else function)(*arguments)

    return within_limits


def choose_anew() -> None:
    """Forget which backends serve what: an emulated GPU has come or gone."""
    for function in (unavailable, choose, select):
        function.cache_clear()
    plans.forget()


def mapped_openmp() -> list[str]:
    """Files of OpenMP runtimes mapped into this process; more than one makes both slow (Linux only)."""
    if not sys.platform.startswith("linux"):
        return []
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "omp" in line}
    return sorted(p for p in paths if any(k in p.rsplit("/", 1)[-1] for k in ("libgomp", "libomp", "libiomp")))
