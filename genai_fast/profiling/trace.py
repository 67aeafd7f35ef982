"""A few steps under PyTorch's profiler: how many calls and kernels, where the time goes, and a trace for a viewer."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

# The profiler announces its start and end on stderr otherwise; it reads this once.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")

OUTSIDE = "(outside PyTorch's operators)"  # Python, and C++ kernels that are called past the dispatcher
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")


class Operator(NamedTuple):
    """An operator, or a kernel, of a step: its calls, and the seconds that it took itself and with what it called."""

    name: str
    calls: float
    own_seconds: float
    seconds: float


class Traced(NamedTuple):
    """Of one step. On CUDA the operators' times are the device's, elsewhere the host's."""

    operator_calls: float  # of the outermost operators
    kernels: float | None  # that ran on the device; None without one
    launches: float | None  # by the host, of kernels and graphs
    device_seconds: float | None  # that at least one kernel was running
    whole: float  # seconds that the operators' times are parts of
    operators: tuple[Operator, ...]  # by own_seconds, the longest first; all of them


def trace(step: Callable[[], Any], steps: int, cuda: bool, path: Path) -> Traced:
    """Profile that many steps; write what happened to `path` (JSON for chrome://tracing or ui.perfetto.dev)."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as profile, torch.profiler.record_function(_WINDOW):
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))
    return _read(profile, steps, cuda)


_WINDOW = "genai_fast profile"


def _read(profile: Any, steps: int, cuda: bool) -> Traced:
    events = list(profile.events())
    window = next(e for e in events if e.name == _WINDOW and e.device_type == DeviceType.CPU)
    wall = window.time_range.elapsed_us() * 1e-6
    outermost = [e for e in events if _is_operator(e) and not any(map(_is_operator, _above(e)))]
    averages = [a for a in profile.key_averages() if _named(a.key)]
    if not cuda:
        found = [
            Operator(a.key, a.count / steps, a.self_cpu_time_total * 1e-6 / steps, a.cpu_time_total * 1e-6 / steps)
            for a in averages
        ]
        outside = max(0.0, wall - _covered(e for e in outermost if e.thread == window.thread))
        found.append(Operator(OUTSIDE, 1.0, outside / steps, outside / steps))
        return Traced(len(outermost) / steps, None, None, None, wall / steps, _sorted(found))
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    kernels = [e for e in on_device if not e.name.startswith(("Memcpy", "Memset"))]
    busy = _covered(on_device)
    found = [
        Operator(a.key, a.count / steps, a.self_device_time_total * 1e-6 / steps, a.device_time_total * 1e-6 / steps)
        for a in averages
        if a.device_type == DeviceType.CPU and a.device_time_total
    ]
    total = sum(e.time_range.elapsed_us() for e in on_device) * 1e-6
    if sum(o.own_seconds for o in found) * steps < total / 2:  # a graph was replayed: its kernels have no operator
        found = _by_kernel(on_device, steps)
    launches = sum(e.name.startswith(_LAUNCHES) for e in events if e.device_type == DeviceType.CPU)
    counts = (len(x) / steps for x in (outermost, kernels))
    return Traced(*counts, launches / steps, busy / steps, total / steps, _sorted(found))


def _by_kernel(on_device: list[Any], steps: int) -> list[Operator]:
    calls, seconds = Counter(e.name for e in on_device), Counter()
    for e in on_device:
        seconds[e.name] += e.time_range.elapsed_us() * 1e-6
    return [Operator(name, calls[name] / steps, s / steps, s / steps) for name, s in seconds.items()]


def _sorted(found: Iterable[Operator]) -> tuple[Operator, ...]:
    return tuple(sorted(found, key=lambda o: o.own_seconds, reverse=True))


def _named(name: str) -> bool:
    return "::" in name and not name.startswith(("autograd::", "profiler::"))


def _is_operator(event: Any) -> bool:
    return event.device_type == DeviceType.CPU and _named(event.name)


def _above(event: Any) -> Iterator[Any]:
    parent = event.cpu_parent
    while parent is not None:
        yield parent
        parent = parent.cpu_parent


def _covered(events: Iterable[Any]) -> float:
    """Seconds in which at least one of them ran."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted((e.time_range.start, e.time_range.end) for e in events):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total * 1e-6
