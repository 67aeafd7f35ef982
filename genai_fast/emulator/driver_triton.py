"""The emulated GPU behind Triton's own launch path: `kernel[grid](...)` on CPU tensors is compiled and run.

Triton specialises, binds arguments and compiles as it does for a real one. Its last stage (ptxas) is left out: what is
"loaded" is the PTX itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver as drivers

from genai_fast import backends
from genai_fast.emulator.devices import DEVICES, Device
from genai_fast.emulator.findings import Finding, KernelFault
from genai_fast.emulator.kernel import Kernel, Options
from genai_fast.emulator.ptx import Unsupported
from genai_fast.emulator.record import Record, table
from genai_fast.errors import UsageError
from genai_fast.kernels.common import launch
from genai_fast.kernels.common.extension import interpreting

FIRST_DEVICE = 1000  # beyond any real device's number: Triton keeps what it compiled by the number of the device
MOST_THREADS = 1024  # of a program


class EmulatedGPU:
    """A GPU of an architecture, as a context: inside, Triton kernels that are launched on CPU tensors run on it.

    Attributes:
        records: a Record of each launch.
        change: applied to the PTX of each kernel before it runs, for tests that break one.
    """

    def __init__(self, arch: int, strict: bool, keep: bool, options: dict[str, Any]) -> None:
        if arch not in DEVICES:
            raise ValueError(f"emulated_gpu: arch must be one of {', '.join(map(str, DEVICES))}, got {arch!r}")
        self.arch, self.device, self.strict, self.keep = arch, DEVICES[arch], strict, keep
        self._options = options
        Options(**options)  # an unknown one is refused here
        self.records: list[Record] = []
        self.warnings: list[Finding] = []
        self.change: Callable[[str], str] = str
        self.launches = self.warp_instructions = 0
        self._kernels: dict[str, Kernel] = {}
        self._before: tuple[Any, ...] = ()

    def __enter__(self) -> EmulatedGPU:
        if interpreting():
            raise UsageError("emulated_gpu: an interpreting process cannot compile; remedy: unset TRITON_INTERPRET")
        if self._before or launch.emulated is not None:
            raise UsageError("emulated_gpu: expected one at a time, got one inside another")
        self._before = drivers._active, knobs.runtime.add_stages_inspection_hook, knobs.cache.dir
        drivers.set_active(_Driver(self))
        knobs.runtime.add_stages_inspection_hook = _without_ptxas
        # Some versions of Triton do not see the hook in the key of what they keep: never mix it with real binaries.
        knobs.cache.dir = os.path.join(knobs.cache.dir, "emulated")
        launch.emulated = SimpleNamespace(
            major=self.arch // 10, minor=self.arch % 10, multi_processor_count=self.device.multiprocessors,
            shared_memory_per_block_optin=self.device.program_shared_bytes, plans=False,
        )  # fmt: skip
        backends.choose_anew()
        return self

    def __exit__(self, *exception: object) -> None:
        drivers._active, knobs.runtime.add_stages_inspection_hook, knobs.cache.dir = self._before
        self._before, launch.emulated = (), None
        backends.choose_anew()

    def report(self) -> str:
        """A table with a line for each launch, and what was found, worst first."""
        found = {str(f): f for r in self.records for f in r.findings}.values()
        lines = [f"{'warning' if f.is_warning else 'FAULT'}: {f}" for f in sorted(found, key=lambda f: f.is_warning)]
        return "\n".join([table(self.records), *lines])

    def kernel(self, ptx: str) -> Kernel:
        """Decoded, once."""
        ptx = self.change(ptx)
        if ptx not in self._kernels:
            self._kernels[ptx] = Kernel(ptx)
        return self._kernels[ptx]

    def run(self, ptx: str, metadata: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        """One launch."""
        kernel, threads = self.kernel(ptx), 32 * metadata.num_warps
        resident = self.device.resident_programs(threads, metadata.shared)
        programs = grid[0] * grid[1] * grid[2]
        if metadata.launch_cooperative_grid and programs > resident:
            raise KernelFault(
                f"{kernel.name}: a cooperative launch of {programs} programs, of which {resident} fit on sm_{self.arch}"
                f" ({threads} threads and {metadata.shared} bytes of shared memory each)"
            )
        options = Options(**{"max_resident": resident, **self._options})
        record = kernel.launch(grid, threads, metadata.shared, arguments, options)
        self.launches += 1
        self.warp_instructions += record.warp_instructions
        if self.keep:
            self.records.append(record)
        wrong = [f for f in record.findings if not f.is_warning]
        self.warnings += [f for f in record.findings if f.is_warning]
        if wrong and self.strict:
            raise KernelFault("\n".join(map(str, wrong)))


class _Utils:
    """What Triton asks of a driver's library."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._device.program_shared_bytes, "multiprocessor_count": self._device.multiprocessors,
            "max_num_regs": 65536, "warpSize": 32, "sm_clock_rate": int(self._device.clock / 1e3),
        }  # fmt: skip

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, str, int, int, int]:
        """(module, function, registers, spills, threads); the function is the PTX."""
        if not binary.startswith(b"//"):
            raise Unsupported(f"{name}: expected PTX, got a binary")
        return object(), binary.decode(), 0, 0, MOST_THREADS


class _Launcher:
    """Of one compiled kernel: called with the arguments as the kernel's source names them."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._signature, self._metadata = dict(source.signature), metadata

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: str, packed: Any, launch_metadata: Any, enter: Any,
        leave: Any, *values: Any,
    ) -> None:  # fmt: skip
        gpu, grid = drivers.active.gpu, (x, y, z)
        programs = x * y * z
        if not programs:
            return
        arguments: dict[str, Any] = {}
        for (name, kind), value in zip(self._signature.items(), values, strict=True):
            _flatten(arguments, str(name), kind, value)
        kernel = gpu.kernel(function)
        scratch = self._metadata.global_scratch_size * programs * self._metadata.num_ctas
        more = [torch.zeros(scratch, dtype=torch.uint8) if scratch else None, None]
        for k in range(len(kernel.entry.parameters) - len(arguments)):
            arguments[f"scratch {k}"] = more[k]
        if enter is not None:
            enter(launch_metadata)
        gpu.run(function, self._metadata, grid, arguments)
        if leave is not None:
            leave(launch_metadata)


def _flatten(arguments: dict[str, Any], name: str, kind: Any, value: Any) -> None:
    """Arguments of the compiled kernel: members of tuples one by one, and no constants."""
    if isinstance(kind, tuple):
        for k, (inner, member) in enumerate(zip(kind, value, strict=True)):
            _flatten(arguments, f"{name}[{k}]", inner, member)
    elif kind != "constexpr":
        if str(kind).startswith("tensordesc"):
            raise Unsupported(f"argument {name}: tensor descriptors")
        arguments[name] = getattr(value, "base", value)  # of what torch and Triton wrap


class _Driver(DriverBase):
    """Triton's driver of one emulated GPU."""

    launcher_cls = _Launcher

    def __init__(self, gpu: EmulatedGPU) -> None:
        self.gpu, self.utils = gpu, _Utils(gpu.device)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.gpu.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        raise Unsupported("a device's clock: an emulator has no time")

    def get_benchmarker(self) -> Any:
        """For triton.autotune: it runs each configuration once, and takes the one with the fewest instructions."""

        def instructions(call: Callable[[], Any], quantiles: Any = None, **settings: Any) -> Any:
            before = self.gpu.warp_instructions
            call()
            count = float(self.gpu.warp_instructions - before)
            return count if quantiles is None else [count for _ in quantiles]

        return instructions

    def get_current_device(self) -> int:
        return FIRST_DEVICE + self.gpu.arch

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0


def _without_ptxas(*arguments: Any) -> Any:
    """Triton's hook on its stages; without arguments, what is added to the key of its cache."""
    if not arguments:
        return "the PTX is loaded", "the PTX is loaded"
    arguments[1]["cubin"] = lambda ptx, metadata: ptx.encode()
    return None
