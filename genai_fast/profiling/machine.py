"""The machine that is measured on: what it is, and how fast it multiplies matrices."""

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from genai_fast.autotune import processor
from genai_fast.kernels.common import onednn
from genai_fast.kernels.common.extension import cpu_kernels, extension
from genai_fast.precision import float32_products
from genai_fast.versions import __version__, version

GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
_EMULATED_SIZE = 512  # on a CPU that lacks the type: 2048 takes minutes
_REPEATS, _SECONDS = 15, 2.0  # of one measurement: this many, or three if that takes so long


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def environment(device: str) -> dict[str, Any]:
    """Device, driver and versions. Clocks and power only where NVIDIA's management library answers."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu_kernels()[1] if extension()[0] is not None else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{package: version(package) for package in ("triton", "numpy")},
        "genai-fast": __version__,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory_bytes"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
        found.update(_management())
    return found


def nvml() -> tuple[Any, Any]:
    """NVIDIA's management library and its handle of the current CUDA device; raises where there is none."""
    import pynvml

    pynvml.nvmlInit()
    # By its identity: CUDA_VISIBLE_DEVICES renumbers devices.
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def _management() -> dict[str, Any]:
    """Driver, clocks (MHz), power (W) and temperature (degrees Celsius), as they are at this moment."""
    try:
        pynvml, handle = nvml()
        readings = {
            "driver": lambda: pynvml.nvmlSystemGetDriverVersion(),
            "clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "clock_limit_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "power_limit_watts": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "temperature_celsius": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        }
    except Exception as error:  # no library, no driver, no permission: the record says which
        return {"management": f"{type(error).__name__}: {error}"}
    found = {}
    for name, read in readings.items():
        try:
            value = read()
            found[name] = value.decode() if isinstance(value, bytes) else value
        except pynvml.NVMLError as error:
            found[name] = str(error)
    return found


def fastest(call: Callable[[], object], device: str) -> float:
    """Least wall time of a call, in seconds: a roof is what the machine can do, not what it usually does."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    times: list[float] = []
    while len(times) < _REPEATS and (len(times) < 3 or sum(times) < _SECONDS):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def gemm(device: str, precision: str) -> float:
    """FLOP/s of a product of large random square matrices, in the fastest library available.

    Args:
        precision: float32, bfloat16 or float16; on CUDA also tf32: float32 rounded by the tensor cores.
    """
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    size = GEMM_SIZE[device]
    if device == "cpu" and dtype is not torch.float32 and not onednn.serves(dtype):
        size = min(size, _EMULATED_SIZE)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    libraries = [lambda: a @ b]
    if device == "cpu" and onednn.serves(dtype):
        # oneDNN, which uses wider vectors than MKL does on some processors.
        libraries.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    with float32_products("tf32" if precision == "tf32" else "ieee"):
        return max(2 * size**3 / fastest(call, device) for call in libraries)
