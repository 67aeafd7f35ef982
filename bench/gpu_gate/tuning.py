"""The stage "tuning": the fastest settings of a kernel's launch on this GPU, among those that its spec lists.

A task is a bench point and a launch in it. Each setting is timed in the whole forward and backward, interleaved with
the default. The default is replaced by the fastest setting that gains `GAIN` and with which the point itself is right,
and so is each case of the op that would be launched with it. `write` stores the results.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from bench import clock
from bench.gpu_gate.runs import capture_on, check, inputs_of, numerics, step_of
from bench.points import FUSED, Point, fused_backend, points, run_of
from bench.report import files
from genai_fast.kernels.common import tuned
from genai_fast.kernels.common.launch import capability
from genai_fast.profiling import compare
from genai_fast.profiling.machine import device_name
from genai_fast.testing import CONVOLUTIONS, Run, every_run

GAIN = 1.02
DEFAULT = "default"

Times = Callable[[dict[str, list[Callable[[], Any]]]], dict[str, float]]


def tasks(device: str) -> Iterator[tuple[str, Point, str]]:
    """(task, point, launch) of all that can be tried."""
    for point in points(device):
        for name in point.op.choices:
            yield f"{point} {name}", point, name


def tune(point: Point, name: str, times: Times) -> dict[str, Any]:
    """The best settings of a launch in a point.

    Returns: kernel, case; and if the point launches it: dtype, shape, default and settings (the best), default_us and
        best_us of the whole point, tried (microseconds, or why not), refused (what is faster, and wrong), kept (not the
        default), reason.
    """
    found: dict[str, Any] = {"kernel": name, "case": str(point), "kept": False}
    step = point.step(FUSED)
    with tuned.asked() as launches:
        step()
    mine = next((x for x in launches if x.name == name), None)
    if mine is None:
        return {**found, "reason": "not launched here"}
    default = dict(mine.default)
    ready, failed, settings = {DEFAULT: _sets(point, name, default)}, {}, {DEFAULT: default}
    for choice in point.op.choices[name]:
        if choice == default:
            continue
        label = ", ".join(f"{key} {value}" for key, value in choice.items())
        try:
            calls = _sets(point, name, choice)
            calls[0]()
            _wait(point.device)
        except Exception as error:  # too much shared memory, too many registers: the compiler says
            failed[label] = f"{type(error).__name__}: {error}"[:200]
            continue
        ready[label], settings[label] = calls, choice
    seconds = times(ready)
    kept, refused = DEFAULT, {}
    for label in sorted(seconds, key=seconds.get):
        if seconds[label] * GAIN > seconds[DEFAULT]:
            break
        message = wrong(point, mine, settings[label])
        if not message:
            kept = label
            break
        refused[label] = message[:200]
    why_not = next(iter(refused.values()), "the default is as fast")
    return {
        **found, "kept": kept != DEFAULT, "reason": "" if kept != DEFAULT else why_not,
        "dtype": mine.dtype, "shape": list(mine.shape), "default": default, "settings": default | settings[kept],
        "default_us": round(seconds[DEFAULT] * 1e6, 2), "best_us": round(seconds[kept] * 1e6, 2),
        "tried": {label: round(t * 1e6, 2) for label, t in seconds.items()} | failed, "refused": refused,
    }  # fmt: skip


def wrong(point: Point, mine: tuned.Launch, settings: tuned.Settings) -> str:
    """What is wrong with these settings of a launch, in this point or where else they would be taken; "" if nothing.

    Cases of another dtype, or a shape too far away, are launched otherwise: what is best here may be too large there.
    """
    backend = fused_backend(point.op, point.device)
    cases = [
        run
        for run in every_run((point.device,))
        if run.op is point.op and (run.dtype, run.backend) == (point.dtype, backend) and not run.tf32
    ]
    own = [run for run in _precisions(run_of(point)) if _takes(run, mine, settings)]
    others = [run for run in _precisions(*cases) if _takes(run, mine, settings)]
    if not own:
        return "where the point's numbers are checked it is not launched"
    with tuned.tried(mine.name, settings):
        for run in own:
            if message := numerics(run):
                return message
        for run in others:
            for message in check(run, capture_on(point.device)).values():
                return message
    return ""


def _precisions(*runs: Run) -> Iterator[Run]:
    """Each run, and it in TF32 where that has launches of its own."""
    for run in runs:
        yield run
        if run.op.folder in CONVOLUTIONS and (run.dtype, run.device) == (torch.float32, "cuda"):
            yield replace(run, tf32=True)


def _takes(run: Run, mine: tuned.Launch, settings: tuned.Settings) -> bool:
    """Whether a run has a launch that settings found at this one are taken for."""
    entry = {"dtype": mine.dtype, "shape": mine.shape, "settings": settings}
    with run.products(), tuned.asked() as launches, contextlib.suppress(Exception):  # a case that fails as it is
        step_of(run, inputs_of(run))()
    return any(x.name == mine.name and tuned.nearest([entry], x.dtype, x.shape) is not None for x in launches)


def _sets(point: Point, name: str, settings: tuned.Settings) -> list[Callable[[], Any]]:
    """The point's step over several inputs, with these settings."""

    def under(step: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with tuned.tried(name, settings):
                return step()

        return call

    return [under(point.step(FUSED, seed)) for seed in range(point.input_sets)]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def device_times(ready: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """Seconds on the GPU."""
    return {name: seconds for name, (seconds, _) in clock.device_times(ready).items()}


def wall_times(ready: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """Seconds of the clock."""
    timings = compare({name: calls[0] for name, calls in ready.items()}, rounds=3).timings
    return {name: t.median for name, t in timings.items()}


def write(results: Iterable[dict[str, Any]], device: torch.device, commit: str) -> list[str]:
    """Add what was measured to kernels/<op>/tuned/<gpu>.json; returns the files' names.

    A shape at which the default is best is written too: otherwise it would take a neighbour's settings.
    """
    name, changed = device_name(device.type), {}
    for result in (result for result in results if "settings" in result):
        path = tuned.file_of(result["kernel"], name)
        content = changed.setdefault(path, tuned.read(path))
        content |= {"device": name, "capability": capability(device), "commit": commit}
        known, key = content.setdefault("launches", {}), (result["dtype"], result["shape"])
        others = [e for e in known.get(result["kernel"], []) if (e["dtype"], e["shape"]) != key]
        entry = {key: result[key] for key in ("dtype", "shape", "settings", "default_us", "best_us")}
        known[result["kernel"]] = [*others, entry]
    for path, content in changed.items():
        files.write_json(path, content)
    tuned.reload()
    return [str(path.relative_to(files.ROOT)) for path in changed]


@functools.cache
def _known(device: str) -> dict[str, tuple[Point, str]]:
    return {task: (point, name) for task, point, name in tasks(device)}


def work(task: str, device: str) -> dict[str, Any]:
    return tune(*_known(device)[task], device_times if device == "cuda" else wall_times)
