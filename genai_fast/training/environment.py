"""What decides the bits of a result on this machine."""

import os
import platform
from collections.abc import Iterator
from typing import Any

import torch

from genai_fast import autotune, backends, cpu
from genai_fast.kernels.common import extension
from genai_fast.training import distributed
from genai_fast.versions import version

# They choose other arithmetic; what OMP_NUM_THREADS and GENAI_FAST_ISA do shows in "threads" and "isa".
VARIABLES = (
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "GENAI_FAST_SEQUENCE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE", "ONEDNN_MAX_CPU_ISA", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TRITON_INTERPRET",
)  # fmt: skip


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, threads, processes, instruction set, each op's backend, PyTorch's switches; as JSON has it."""
    on_cuda = device.type == "cuda"
    served = {name: backends.choose(name, backends.forced_backend(), device.type)[0] for name in backends.FOLDERS}
    packages = ("genai_fast", "torch", *(("triton",) if "triton" in served.values() else ()))
    deterministic = {"paths": autotune.pinned(), "algorithms": torch.are_deterministic_algorithms_enabled()}
    tuning, cudnn = cpu.active(), torch.backends.cudnn
    libraries = {"mkldnn": torch.backends.mkldnn.enabled, "products by oneDNN": list(tuning.onednn) if tuning else []}
    if on_cuda:
        deterministic["cudnn"] = cudnn.deterministic
        libraries["cudnn"] = cudnn.version() if cudnn.enabled else False
    return {
        **{name: version(name) for name in packages},
        "processor": autotune.processor(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
        "isa": extension.cpu_kernels()[1] if "cpu" in served.values() else "none",
        "backends": served,
        "precision": _precision(on_cuda),
        "deterministic": deterministic,
        "libraries": libraries,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _precision(on_cuda: bool) -> dict[str, str]:
    """Of float32 products: "ieee", "tf32", "bf16", or "none" for what the library does by itself."""
    kinds = torch.backends
    switches = {"mkldnn.matmul": kinds.mkldnn.matmul, "mkldnn.conv": kinds.mkldnn.conv, "mkldnn.rnn": kinds.mkldnn.rnn}
    if on_cuda:
        switches = {"cuda.matmul": kinds.cuda.matmul, "cudnn.conv": kinds.cudnn.conv, "cudnn.rnn": kinds.cudnn.rnn}
    return {name: switch.fp32_precision for name, switch in switches.items()}


def changes(then: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, what has changed from one environment to another; "" if nothing has."""
    names: dict[str, list[str]] = {}
    for name, change in _differences(then, now):
        names.setdefault(change, []).append(name)
    return "; ".join(f"{_listed(which)}: {change}" for change, which in names.items())


def _differences(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Names, with a dot at each level, and what has become of each."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from _differences(then.get(key, "nothing"), now.get(key, "nothing"), f"{name}.{key}".lstrip("."))
    elif then != now:
        yield name, f"{then} then, {now} now"


def _listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
