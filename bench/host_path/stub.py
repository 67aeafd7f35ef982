"""A GPU that does nothing: Triton's own driver and launcher, on CPU tensors, with a libcuda of ours behind them.

Kernels are compiled for an H100 and launched by the same Python and C as on one; results are whatever memory held.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import genai_fast.ops  # noqa: F401  (loads what is patched)
from genai_fast import backends
from genai_fast.emulator.build import compiler, folder
from genai_fast.kernels.common import launch

ARCH = 90
SOURCE = Path(__file__).with_name("stub.c")
_HEAD = 10  # numbers of a launch before its parameters
_BYTES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "fp16": 2, "bf16": 2, "i64": 8, "u64": 8, "fp64": 8}
_FIRST_DEVICE = 2000  # beyond any real device's number: Triton keeps what it compiled by the number of the device
_kernels: dict[int, str] = {}  # function -> name


@dataclass(frozen=True)
class Launch:
    """One launch as libcuda saw it."""

    kernel: str
    function: int  # of that name, one for each specialisation and device
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    stream: int
    attributes: int  # of the launch: cooperative grids have one
    parameters: tuple[int, ...]  # the bits of each


@functools.cache
def library() -> ctypes.CDLL:
    """The stub as this process's libcuda.so.1, compiled if need be."""
    source = SOURCE.read_bytes()
    place = folder().parent / "stub_cuda" / hashlib.sha256(source).hexdigest()[:16]
    target = place / "libcuda.so.1"
    if not target.exists():
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as temporary:
            made = Path(temporary) / target.name
            flags = ("-x", "c", "-O2", "-shared", "-fPIC", f"-Wl,-soname,{target.name}")
            subprocess.run([compiler(), *flags, str(SOURCE), "-o", str(made)], check=True)
            os.replace(made, target)
    found = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)  # so that later loads of libcuda.so.1 find it by name
    found.stub_log.restype, found.stub_used.restype = ctypes.c_void_p, ctypes.c_size_t
    found.stub_functions.restype = ctypes.c_ssize_t
    found.stub_declare.argtypes = ctypes.c_ssize_t, ctypes.c_int, ctypes.POINTER(ctypes.c_int)
    return found


class StubGPU:
    """Inside `stub_gpu`: which device and stream are current, and what is launched."""

    def __init__(self, stub: ctypes.CDLL) -> None:
        self.device, self.stream = _FIRST_DEVICE, 0
        self._stub = stub

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Launch]]:
        """The launches inside, once it is left."""
        found: list[Launch] = []
        self._stub.stub_record(1)
        try:
            yield found
            raw = ctypes.string_at(self._stub.stub_log(), self._stub.stub_used())
            found += self._read(memoryview(raw).cast("q").tolist())
        finally:
            self._stub.stub_record(0)

    def _read(self, numbers: list[int]) -> Iterator[Launch]:
        while numbers:
            x, y, z, threads, shared, function, stream, attributes, count, _ = numbers[:_HEAD]
            parameters = tuple(numbers[_HEAD : _HEAD + count])
            yield Launch(_kernels[function], function, (x, y, z), threads, shared, stream, attributes, parameters)
            del numbers[: _HEAD + count]

    def _declare(self, function: int, name: str, kinds: list[str]) -> None:
        sizes = [8 if kind.startswith("*") else _BYTES.get(kind, 4) for kind in kinds]
        if self._stub.stub_declare(function, len(sizes), (ctypes.c_int * len(sizes))(*sizes)):
            raise RuntimeError(f"stub_gpu: expected fewer kernels or parameters, got {name} with {len(sizes)}")
        _kernels[function] = name

    def driver(self) -> Any:
        """Triton's CUDA driver, told what PyTorch would know of the device."""
        from triton.backends.nvidia import driver as nvidia

        made = nvidia.CudaDriver()
        made.get_device_capability = lambda device: divmod(ARCH, 10)
        made.get_current_device = lambda: self.device
        made.get_current_stream = lambda device: self.stream
        load, signatures = made.utils.load_binary, []

        def launcher(source: Any, metadata: Any) -> Any:
            signatures.append([kind for kind in source.signature.values() if kind != "constexpr"])
            return nvidia.CudaLauncher(source, metadata)

        def load_binary(name: str, *more: Any) -> Any:
            loaded = load(name, *more)
            self._declare(loaded[1], name, signatures.pop())
            return loaded

        made.launcher_cls = launcher
        made.utils = SimpleNamespace(**{**vars(made.utils), "load_binary": load_binary})
        return made


@contextlib.contextmanager
def stub_gpu() -> Iterator[StubGPU]:
    """Inside, `use_backend("triton")` launches compiled kernels on CPU tensors, which return at once."""
    from triton import knobs
    from triton.runtime.driver import driver

    stub = library()
    gpu = StubGPU(stub)
    properties = SimpleNamespace(
        major=ARCH // 10, minor=ARCH % 10, multi_processor_count=132, shared_memory_per_block_optin=232448,
        plans=True, current_device=lambda: gpu.device,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(knobs.nvidia.scope())
        knobs.nvidia.libcuda_path = os.path.dirname(stub._name)
        stack.enter_context(mock.patch.object(driver, "_active", gpu.driver()))
        stack.enter_context(mock.patch.object(launch, "emulated", properties))
        for name, module in list(sys.modules.items()):
            if name.startswith("genai_fast.ops.") and hasattr(module, "readable"):  # values are not, as of CUDA tensors
                stack.enter_context(mock.patch.object(module, "readable", lambda x: False))
        backends.choose_anew()
        stack.callback(backends.choose_anew)
        yield gpu
