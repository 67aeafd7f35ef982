"""Process-wide settings for training on a CPU: the allocator, the matmul library, the threads."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from genai_fast import autotune
from genai_fast.backends import FallbackWarning
from genai_fast.ops.register import override

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_KEPT, _DEFAULT = 1 << 30, 128 << 10  # bytes
_SHAPES = ((2048, 384, 1536), (512, 256, 512), (128, 256, 256))  # rows, inputs, outputs of the layers measured
_FORMS = ("output", "input gradient", "weight gradient")  # of a linear layer: x w^T, g w, g^T x
_FLOOR = 1e-6  # of a product's relative error, in float32

Product = Callable[..., torch.Tensor]


class CPUTuning(contextlib.AbstractContextManager):
    """What `tune_cpu` did, in words by str(); `remove()` undoes it, and so does the end of a `with` block.

    Attributes:
        memory: whether freed memory is kept; and why not, in `notes`.
        onednn: the forms of matrix products that go to oneDNN ("output", "input gradient", "weight gradient"), each
            with the multiplications that a product must have.
        threads: of PyTorch.
    """

    def __init__(self) -> None:
        self.memory, self.calls = False, 1
        self.onednn: dict[str, int] = {}
        self.notes: list[str] = []
        self.threads = self._threads = torch.get_num_threads()
        self._library: torch.library.Library | None = None

    def remove(self) -> None:
        """Everything as it was before, but for glibc's thresholds: those get their defaults, and no longer adapt."""
        global _active
        if _active is not self:
            return
        _active = None
        if self._library is not None:
            self._library._destroy()
        if self.memory:
            _set_thresholds(_DEFAULT)
            ctypes.CDLL(None).malloc_trim(0)
        torch.set_num_threads(self._threads)

    def __str__(self) -> str:
        products = f"by oneDNN ({', '.join(self.onednn)})" if self.onednn else "by PyTorch's own library"
        memory = "freed memory kept" if self.memory else "stock allocator"
        return "; ".join([memory, f"matmuls {products}", f"{self.threads} threads", *self.notes])

    def __exit__(self, *exception: object) -> None:
        self.calls -= 1
        if not self.calls:
            self.remove()


_active: CPUTuning | None = None


def tune_cpu(*, memory: bool = True, matmul: bool = True, threads: bool = True) -> CPUTuning:
    """Process-wide settings that speed up the training of any model on a CPU.

    - memory: glibc keeps freed memory instead of returning it to the system, which would clear it before handing it out
      again: no page faults in a step that has run before. The process keeps its peak memory.
    - matmul: float32 matmuls go to oneDNN if that is measured faster than PyTorch's library (MKL does not use AVX-512
      on AMD's processors). Each form of matmul is measured in three sizes once per machine and remembered, like
      convolutions (`genai_fast.autotune`), and checked against float64 in every process. Matmuls of slices, those
      smaller than the measured sizes, and deterministic runs stay with PyTorch's library.
    - threads: at most the cores that this process may use (affinity, a container's quota).

    A FallbackWarning names what is not available. Gradients and double backward are unaffected: the replacement is
    below autograd. Compiled models keep what they were compiled with, so call this first.

    Returns: What was done; `.remove()` or the end of a `with` block undoes it. A second call returns the same object,
        and its `with` block undoes nothing.
    """
    global _active
    if _active is not None:
        _active.calls += 1
        return _active
    _active = done = CPUTuning()
    try:
        allowed = allowed_cores()
        if threads and torch.get_num_threads() > allowed:
            torch.set_num_threads(allowed)
            done.threads = allowed
        if memory:
            reason = _keep_memory()
            done.memory = not reason
            if reason:
                done.notes.append(reason)
        if matmul:
            done.onednn, refused = _faster_in_onednn()
            done.notes += refused
            if done.onednn:
                done._library = _route(done.onednn)
        for note in done.notes:
            warnings.warn(f"tune_cpu: {note}", FallbackWarning, stacklevel=2)
    except BaseException:
        done.remove()
        raise
    return done


def active() -> CPUTuning | None:
    """What `tune_cpu` did in this process and has not been removed."""
    return _active


def allowed_cores() -> int:
    """Cores that this process may use: by its affinity and its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return max(cores, 1)


def _keep_memory() -> str:
    """ "" or the reason why the allocator stays as it is."""
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return "the allocator is unchanged: only glibc's has a setting to keep memory"
    if "malloc" in os.environ.get("LD_PRELOAD", ""):
        return "the allocator is unchanged: LD_PRELOAD names another one"
    if not _set_thresholds(_KEPT):
        _set_thresholds(_DEFAULT)
        return f"the allocator is unchanged: glibc refused thresholds of {_KEPT >> 20} MiB"
    return ""


def _set_thresholds(size: int) -> bool:
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(option, size) for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD)])


def _onednn(bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b + bias."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


def _torch(bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b if bias is None else torch.addmm(bias, a, b)


def _form(a: torch.Tensor, b: torch.Tensor) -> str:
    """Which of a linear layer's products a b is, by their strides; "" for another.

    A slice is another: by 64 of a weight's 320 columns oneDNN multiplies 300 times slower than by a copy of them.
    """
    along_a, along_b = (
        "rows" if x.is_contiguous() else "columns" if x.t().is_contiguous() else "neither" for x in (a, b)
    )
    forms = {("rows", "columns"): "output", ("rows", "rows"): "input gradient", ("columns", "rows"): "weight gradient"}
    return forms.get((along_a, along_b), "")


def _operands(form: str, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, inputs, outputs = shape
    noise = torch.Generator().manual_seed(0)
    sizes = ((rows, inputs), (outputs, inputs), (rows, outputs))
    x, w, g = (torch.randn(*size, generator=noise, device="cpu") for size in sizes)
    return {"output": (x, w.t()), "input gradient": (g, w), "weight gradient": (g.t(), x)}[form]


def _faster_in_onednn() -> tuple[dict[str, int], list[str]]:
    """The forms of products that oneDNN computes faster and as exactly, each with the multiplications from which it
    does, and what is wrong with those that are not."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return {}, ["matmuls are unchanged: this PyTorch has no oneDNN"]
    faster, wrong = {}, []
    for form in _FORMS:
        for shape in _SHAPES:

            def calls(form: str = form, shape: tuple[int, int, int] = shape) -> tuple[dict[str, autotune.Maker], str]:
                operands = _operands(form, shape)
                return {
                    "torch": lambda: lambda: _torch(None, *operands),
                    "onednn": lambda: lambda: _onednn(None, *operands),
                }, "torch"

            if autotune.choose(("matmul", form), shape, torch.device("cpu"), calls).name == "torch":
                break
            faster[form] = math.prod(shape)
        if form not in faster:
            continue
        a, b = _operands(form, _SHAPES[0])
        exact = a.double() @ b.double()
        theirs, ours = ((f(None, a, b) - exact).abs().max() / exact.abs().max() for f in (_torch, _onednn))
        if ours > 2 * theirs + _FLOOR:
            del faster[form]
            wrong.append(f"matmuls ({form}) are unchanged: oneDNN's relative error is {ours:.1e}")
    return faster, wrong


def _route(least: dict[str, int]) -> torch.library.Library:
    """Serve aten's float32 products of these forms by oneDNN, of these many multiplications and more."""

    smallest = min(least.values())

    def served(a: torch.Tensor, b: torch.Tensor) -> bool:
        size, single = a.numel() * b.size(1), a.dtype is torch.float32 and b.dtype is torch.float32
        return size >= smallest and single and size >= least.get(_form(a, b), math.inf)

    def mm(a: torch.Tensor, b: torch.Tensor) -> Any:
        return _onednn(None, a, b) if served(a, b) else NotImplemented

    def addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
        fits = beta == 1 and alpha == 1 and bias.dim() == 1 and bias.dtype is torch.float32 and served(a, b)
        return _onednn(bias, a, b) if fits and len(bias) == b.size(1) else NotImplemented

    library = torch.library.Library("aten", "IMPL")
    override(library, "mm", "CPU", mm)
    override(library, "addmm", "CPU", addmm)
    return library
