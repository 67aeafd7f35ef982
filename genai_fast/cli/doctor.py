"""What is here: versions, devices, backends and why others are not, caches, OpenMP runtimes."""

from __future__ import annotations

import json
import os
import platform
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from genai_fast import autotune, backends, cpu
from genai_fast.errors import UsageError
from genai_fast.kernels.common.extension import cpu_kernels, extension
from genai_fast.registry import OPS
from genai_fast.versions import __version__, version

_PACKAGES = ("torch", "triton", "numpy")


def examine() -> dict[str, Any]:
    """Everything as JSON data; works without the C++ extension, without Triton and without a GPU."""
    devices = _devices()
    return {
        "versions": {
            "genai_fast": __version__,
            "python": platform.python_version(),
            **{name: version(name) or "not installed" for name in _PACKAGES},
            "torch's CUDA": torch.version.cuda or "none",
        },
        "platform": platform.platform(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
        "training on a CPU": _tuning(),
        "ops": {name: {device: _served(name, device) for device in devices} for name in OPS},
        "caches": _caches(),
        "openmp": backends.mapped_openmp(),
        "warnings": _warnings(),
    }


def as_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2)


def as_text(report: dict[str, Any]) -> str:
    """The report for people: a line a fact, ops that share a reason together, warnings last."""
    kernels = report["cpu"]
    lines = ["versions"]
    lines += [f"  {name:<14}{version}" for name, version in report["versions"].items()]
    lines += [f"  {'platform':<14}{report['platform']}", "devices"]
    lines += [f"  {device:<14}{what}" for device, what in report["devices"].items()]
    lines += [
        "CPU kernels",
        f"  {'in use':<14}{kernels['in use'] or kernels['reason']}",
        f"  {'available':<14}{', '.join(kernels['available']) or 'none'}"
        f" (GENAI_FAST_ISA={kernels['GENAI_FAST_ISA'] or 'unset'})",
        f"  {'threads':<14}{report['threads']}",
        f"  {'tune_cpu()':<14}{report['training on a CPU']}",
        "ops",
    ]
    width, reasons = max(map(len, report["ops"])) + 2, defaultdict(list)
    for op, by_device in report["ops"].items():
        for device, served in by_device.items():
            lines.append(f"  {op:<{width}}{device:<6}{served['backend']}")
            for other, reason in served["not"].items():
                reasons[device, f"not {other}: {reason.replace(op, 'the op')}"].append(op)
    for (device, reason), ops in reasons.items():
        others = [op for op in report["ops"] if op not in ops]
        named = ", ".join(ops) if len(ops) < len(others) else f"all but {', '.join(others)}" if others else "every op"
        lines.append(f"  {device}, {reason} ({named})")
    lines.append("caches")
    lines += [f"  {name:<14}{where}" for name, where in report["caches"].items()]
    lines.append("OpenMP runtimes")
    lines += [f"  {path}" for path in report["openmp"]] or ["  none mapped"]
    lines += [f"WARNING: {warning}" for warning in report["warnings"]] or ["all is well"]
    return "\n".join(lines)


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        devices["cuda"] = "; ".join(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in names)
    return devices


def _cpu() -> dict[str, Any]:
    """The C++ kernels: instruction set in use, those that this processor has, and what is wrong."""
    module, reason = extension()
    available = [isa for isa, here in module.instruction_sets().items() if here] if module else []
    in_use = ""
    if module is not None:
        try:
            in_use = cpu_kernels()[1]
        except (RuntimeError, UsageError) as error:  # GENAI_FAST_ISA names one that is not here
            reason = str(error)
    return {
        "in use": in_use,
        "available": available,
        "GENAI_FAST_ISA": os.environ.get("GENAI_FAST_ISA", ""),
        "reason": reason,
    }


def _tuning() -> str:
    """What training on this CPU is done with: see `tune_cpu`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", backends.FallbackWarning)  # it is in the text
        with cpu.tune_cpu() as tuning:
            return str(tuning)


def _served(op: str, device: str) -> dict[str, Any]:
    """Which backend serves a public op's float32 tensors on a device, and why each other does not."""
    names = [library.name for library in OPS[op].library]
    served = {backends.choose(name, backends.forced_backend(), device)[0] for name in names}
    others = {}
    for backend in backends.BACKENDS:
        if backend in served:
            continue
        if backend not in OPS[op].backends:
            others[backend] = f"{op} has no {backend} kernel"
        else:
            others[backend] = backends.unavailable(backend, device) or "another comes first; use_backend() chooses it"
    return {"backend": " and ".join(sorted(served)), "not": others}


def _caches() -> dict[str, str]:
    """Folders of compiled kernels, with their size."""
    home = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    caches = {
        "triton": _size(home),
        "paths": str(autotune.file()) + ("" if autotune.file().exists() else " (none yet)"),
    }
    if inductor:
        caches["inductor"] = _size(Path(inductor))
    return caches


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} (none yet)"
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    return f"{folder} ({len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB)"


def _warnings() -> list[str]:
    found = []
    runtimes = backends.mapped_openmp()
    if len(runtimes) > 1:
        found.append(
            f"{len(runtimes)} OpenMP runtimes are mapped and slow each other: {', '.join(runtimes)};"
            f" remedy: import torch first, and no package with an OpenMP of its own beside it"
        )
    kernels = _cpu()
    if not kernels["in use"]:
        found.append(kernels["reason"])
    if sys.platform.startswith("linux") and torch.cuda.is_available() and version("triton") is None:
        found.append("triton is not installed, so CUDA tensors run on plain PyTorch; remedy: pip install triton")
    return found
