"""What works on this machine: versions, devices, the backend of each op, caches, OpenMP runtimes."""

import json
import os
import platform
import sys
import textwrap
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
_WIDTH = 100  # columns of the text


def examine() -> dict[str, Any]:
    """Everything as JSON data; works without the C++ extension, without Triton and without a GPU."""
    devices, kernels = _devices(), _cpu()
    problems = _warnings(kernels)
    return {
        "ok": not problems,
        "warnings": problems,
        "versions": {
            "genai_fast": __version__,
            "python": platform.python_version(),
            **{name: version(name) or "not installed" for name in _PACKAGES},
            "cuda": torch.version.cuda or "none",
        },
        "platform": platform.platform(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "cpu": kernels,
        "tune_cpu": _tuning(),
        "ops": {name: {device: _served(name, device) for device in devices} for name in OPS},
        "caches": _caches(),
        "openmp": backends.mapped_openmp(),
    }


def as_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2)


def as_text(report: dict[str, Any]) -> str:
    """The report for people: the verdict, then one fact per line; ops that share a reason are listed together."""
    kernels = report["cpu"]
    lines = [f"WARNING: {warning}" for warning in report["warnings"]] or ["ok: no problems found"]
    lines += ["versions", *_pairs(report["versions"] | {"platform": report["platform"]})]
    lines += ["devices", *_pairs(report["devices"]), "CPU kernels"]
    isa = f"{', '.join(kernels['available']) or 'none'} (GENAI_FAST_ISA={kernels['genai_fast_isa'] or 'unset'})"
    lines += _pairs({"in use": kernels["in_use"] or kernels["reason"], "available": isa})
    lines += _pairs({"threads": report["threads"], "tune_cpu()": report["tune_cpu"]})
    lines.append("ops")
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
    lines += ["caches", *_pairs(report["caches"]), "OpenMP runtimes"]
    lines += [f"  {path}" for path in report["openmp"]] or ["  none loaded"]
    return "\n".join(part for line in lines for part in _wrapped(line))


def _pairs(facts: dict[str, Any]) -> list[str]:
    return [f"  {name:<14}{value}" for name, value in facts.items()]


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line, _WIDTH, subsequent_indent=f"{indent}    ", break_long_words=False,
        break_on_hyphens=False, replace_whitespace=False,
    )  # fmt: skip


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        devices["cuda"] = "; ".join(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in names)
    return devices


def _cpu() -> dict[str, Any]:
    """The C++ kernels: instruction set in use, those that this processor supports, and what is wrong."""
    module, reason = extension()
    available = [isa for isa, here in module.instruction_sets().items() if here] if module else []
    in_use = ""
    if module is not None:
        try:
            in_use = cpu_kernels()[1]
        except (RuntimeError, UsageError) as error:  # GENAI_FAST_ISA names one that this processor lacks
            reason = str(error)
    isa = os.environ.get("GENAI_FAST_ISA", "")
    return {"in_use": in_use, "available": available, "genai_fast_isa": isa, "reason": reason}


def _tuning() -> str:
    """What `tune_cpu` sets on this CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", backends.FallbackWarning)  # it is in the text
        with cpu.tune_cpu() as tuning:
            return str(tuning)


def _served(op: str, device: str) -> dict[str, Any]:
    """Which backend serves a public op's float32 tensors on a device, and why each of the others does not."""
    names = [library.name for library in OPS[op].library]
    served = {backends.choose(name, backends.forced_backend(), device)[0] for name in names}
    others = {}
    for backend in backends.BACKENDS:
        if backend in served:
            continue
        if backend not in OPS[op].backends:
            others[backend] = f"{op} has no {backend} kernel"
        else:
            others[backend] = backends.unavailable(backend, device) or "another has priority; use_backend() selects it"
    return {"backend": " and ".join(sorted(served)), "not": others}


def _caches() -> dict[str, str]:
    """Compiled kernels, measured choices, decoded pictures and encoded texts, with their sizes."""
    home = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    caches = {
        "triton": _size(home),
        "autotune": str(autotune.file()) + ("" if autotune.file().exists() else " (none yet)"),
        **{kind: _size(autotune.folder() / kind) for kind in ("images", "sounds", "tokens")},
    }
    if inductor:
        caches["inductor"] = _size(Path(inductor))
    return caches


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} (none yet)"
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    return f"{folder} ({len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB)"


def _warnings(kernels: dict[str, Any]) -> list[str]:
    found = []
    runtimes = backends.mapped_openmp()
    if len(runtimes) > 1:
        found.append(
            f"{len(runtimes)} OpenMP runtimes are loaded and slow each other down: {', '.join(runtimes)};"
            f" remedy: import torch first, and no package that brings its own OpenMP"
        )
    if not kernels["in_use"]:
        found.append(kernels["reason"])
    if sys.platform.startswith("linux") and torch.cuda.is_available() and version("triton") is None:
        found.append("triton is not installed, so CUDA tensors run on plain PyTorch; remedy: pip install triton")
    return found
