"""What a measurement says of where it was made, and the file that keeps it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from genai_fast.kernels.common.extension import cpu_kernels, extension

ROOT = Path(__file__).resolve().parents[1]


def write_json(path: Path, value: Any) -> None:
    """Written whole or not at all."""
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def processor() -> str:
    """Name of the CPU."""
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def commit() -> tuple[str, bool | None]:
    """Abbreviated hash of the checkout's commit, and whether tracked files differ from it."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD").strip()
        return head, bool(_git("status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
        **{package: _version(package) for package in ("triton", "numpy", "genai-fast")},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory_bytes"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
        found.update(_management())
    return found


def _management() -> dict[str, Any]:
    """Driver, clocks (MHz), power (W) and temperature (degrees Celsius), as they are at this moment."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
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
