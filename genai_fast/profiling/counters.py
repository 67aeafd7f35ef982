"""What the machine counts while steps run: memory, page faults, energy. None stands for what it does not tell."""

import contextlib
import ctypes
import gc
from pathlib import Path
from typing import Any

import torch

from genai_fast.profiling.machine import nvml

try:
    import resource
except ImportError:  # not on Windows
    resource = None

_RESET_PEAK = "5"  # written to clear_refs, see proc(5)


def page_faults() -> int | None:
    """Page faults of this process so far that needed no disk: mostly newly mapped memory."""
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class PeakMemory:
    """Most bytes held beyond what was there at construction: `reset` begins to look, `read` says.

    On CUDA tensors ("allocated") and what the allocator took from the device ("reserved"), and how often it had to
    give memory back and try again; on the CPU the resident memory of the process (Linux only).
    """

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self._before = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
        else:
            _trim()
            self._before = (_resident("VmRSS"),)

    def reset(self) -> None:
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
            return
        self._known = False
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
            self._known = True

    def read(self) -> dict[str, int | None]:
        if self._cuda:
            allocated, reserved = self._before
            return {
                "peak_allocated_bytes": torch.cuda.max_memory_allocated() - allocated,
                "peak_reserved_bytes": torch.cuda.max_memory_reserved() - reserved,
                "allocator_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0) - self._retries,
            }
        peak = _resident("VmHWM") if self._known else None
        known = None not in (peak, *self._before)
        return {"peak_resident_growth_bytes": max(0, peak - self._before[0]) if known else None}


def _trim() -> None:
    """Have the allocator hand back what is free, so that no variant reuses another's memory (glibc only)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int | None:
    """Bytes, from /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


class Energy:
    """Joules that the current CUDA device has used, by NVIDIA's management library; `reason`: why that is unknown."""

    def __init__(self, cuda: bool) -> None:
        self._read: Any = None
        self.reason = "" if cuda else "energy: unknown on a CPU"
        if not cuda:
            return
        try:
            pynvml, handle = nvml()
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except Exception as error:  # no package, no driver, no such counter, a part of a device
            self.reason = f"energy: unknown ({type(error).__name__}: {error}); remedy: pip install nvidia-ml-py"

    def joules(self) -> float | None:
        return None if self._read is None else self._read()
