"""The GPU gate: everything that only a GPU can prove, then the figures.

    python -m bench.gpu_gate [--out FILE.json] [--commit HASH]

First the barrier in gru's and lstm's launches (bench.barrier). For each op: numerics of every case and dtype on
the device, two runs bitwise equal, capture and replay as a CUDA graph; then a memory check of small cases where
compute-sanitizer is installed. An op that passes all of it is timed, an op that does not has no figures. One JSON
record says all, in bench/results/<gpu>/<date>-<commit>.json. Exit code: 0 green, 1 red, 2 no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench import clock, record, roofs
from bench.points import DTYPES, Point, figures, fused_backend, points, red
from bench.report import summary
from genai_fast import ops, registry
from genai_fast.backends import use_backend
from genai_fast.kernels.common.spec import OpSpec, Tensors
from genai_fast.profiling import ForeignLoad
from genai_fast.testing import Run, assert_matches_reference, every_run

RESULTS = Path(__file__).parent / "results"
SMALL = 20_000  # elements of the largest input that the memory checker is given: it slows kernels a hundredfold

Step = Callable[[], list[torch.Tensor]]
Capture = Callable[[Step], tuple[Callable[[], None], list[torch.Tensor]]]


def step_of(run: Run, inputs: dict[str, Any]) -> Step:
    """Forward and backward of a run on these inputs: outputs, then gradients."""
    function = getattr(ops, run.op.name)
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]

    def step() -> list[torch.Tensor]:
        with use_backend(run.forced):
            outputs = function(**inputs)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            grads = []
            if leaves:
                upstream = [torch.ones_like(y) for y in outputs]
                grads = list(torch.autograd.grad(outputs, leaves, upstream, allow_unused=True))
        return [x.detach() for x in (*outputs, *grads) if x is not None]

    return step


def _inputs(run: Run) -> dict[str, Any]:
    return run.case.inputs(Tensors(run.dtype, run.device))


def _same(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> bool:
    """Bitwise, so that NaN equals NaN."""
    pairs = list(zip(a, b, strict=True))
    return all(x.dtype == y.dtype and torch.equal(_bits(x), _bits(y)) for x, y in pairs)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def numerics(run: Run) -> str:
    """What is wrong with a run's numbers; "" if nothing."""
    try:
        assert_matches_reference(run)
    except Exception as error:  # an error of the launch is as red as a wrong number
        return f"{type(error).__name__}: {error}"[:1000]
    return ""


def determinism(run: Run) -> str:
    """What is wrong when forward and backward run twice on the same inputs; "" if nothing."""
    try:
        first, second = (step_of(run, _inputs(run))() for _ in range(2))
        return "" if _same(first, second) else f"{run}: two runs on the same inputs differ in their bits"
    except Exception as error:
        return f"{run}: {type(error).__name__}: {error}"[:1000]


def graph_replay(run: Run, capture: Capture = clock.capture) -> str:
    """What is wrong with the captured graph of a run; "" if nothing.

    New numbers are put into the graph's inputs, so a replay that does nothing is seen.
    """
    try:
        inputs = _inputs(run)
        replay, outputs = capture(step_of(run, inputs))
        new = _inputs(run)
        with torch.no_grad():
            for static, x in zip(_tensors(inputs), _tensors(new), strict=True):
                if _writable(x):
                    static.copy_(x.mul_(0.5) if x.is_floating_point() else x)
        replay()
        replayed = [x.clone() for x in outputs]
        if not _same(replayed, step_of(run, new)()):
            return f"{run}: the replay's numbers differ from eager's"
        if "seed" not in inputs or replayed[0].numel() < 2:
            return ""
        replay, outputs = capture(step_of(run, {**inputs, "seed": None}))
        replay()
        first = outputs[0].clone()
        replay()
        if torch.isfinite(first).all() and torch.equal(first, outputs[0]):
            return f"{run}: with seed=None two replays draw the same numbers"
    except Exception as error:
        return f"{run}: {type(error).__name__}: {error}"[:1000]
    return ""


def _tensors(inputs: dict[str, Any]) -> list[torch.Tensor]:
    found = [x for value in inputs.values() for x in (value if isinstance(value, list) else [value])]
    return [x for x in found if isinstance(x, torch.Tensor)]


def _writable(x: torch.Tensor) -> bool:
    """No two elements share memory, as those of an expanded tensor do."""
    return all(stride or size < 2 for size, stride in zip(x.shape, x.stride(), strict=True))


def check_op(op: OpSpec, runs: list[Run], capture: Capture = clock.capture) -> dict[str, Any]:
    """The op's gate: how many checks ran, and every failure."""
    failures: dict[str, list[str]] = {"numerics": [], "determinism": [], "graph": []}
    for run in runs:
        failures["numerics"].append(numerics(run))
    for run in (run for run in runs if run.backend == fused_backend(op, run.device)):
        failures["determinism"].append(determinism(run))
        failures["graph"].append(graph_replay(run, capture))
    checks = {name: len(messages) for name, messages in failures.items()}
    found = {name: [m for m in messages if m] for name, messages in failures.items()}
    return {"op": op.name, "checks": checks, "failures": {name: m for name, m in found.items() if m}}


def green(check: dict[str, Any]) -> bool:
    """Whether an op passed everything, and anything was checked at all."""
    return not check["failures"] and all(check["checks"].values())


def gated_figures(
    checks: dict[str, dict[str, Any]],
    todo: Iterable[Point],
    measure: Callable[[Point], dict[str, Any]] = figures,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Figures of the points that may have some, and for the others why they have none."""
    found, refused = [], []
    for point in todo:
        reason = "" if green(checks[point.op.name]) else f"the gate of {point.op} is red"
        reason = reason or red(point)
        if reason:
            refused.append({"point": str(point), "reason": reason})
            continue
        try:
            found.append(measure(point))
        except Exception as error:
            refused.append({"point": str(point), "reason": f"{type(error).__name__}: {error}"[:1000]})
    return found, refused


def memory_check() -> dict[str, Any]:
    """compute-sanitizer's memcheck on the small cases, in a process of its own; it may be missing."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "bench.gpu_gate"]
    # Out of a caching allocator's large blocks nothing looks out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, "--small-cases"],
            cwd=record.ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
    except subprocess.TimeoutExpired:
        return {"skipped": "compute-sanitizer took more than 600 s"}
    return {"passed": done.returncode == 0, "output": (done.stdout + done.stderr)[-2000:]}


def barrier_check(limit: float = 300.0) -> dict[str, Any]:
    """bench.barrier in a process of its own, which is ended where it waits for ever.

    Unless it passes, gru and lstm run step by step from then on.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.barrier"], cwd=record.ROOT, capture_output=True, text=True, timeout=limit
        )
        found = {"passed": done.returncode == 0, "output": (done.stdout + done.stderr)[-2000:]}
        if done.returncode == 2:
            found = {"skipped": done.stdout.strip() or "no layer fits in one launch here"}
    except subprocess.TimeoutExpired as expired:
        said = (expired.stdout or b"").decode(errors="replace")
        found = {"passed": False, "output": f"{said[-2000:]}no end after {limit:g} s"}
    if not found.get("passed", False):
        os.environ["GENAI_FAST_SEQUENCE"] = "0"
    return found


def small_cases() -> None:
    """What runs under the memory checker: each op's small cases in float32."""
    for run in every_run(("cuda",)):
        if run.backend != "triton" or run.dtype is not torch.float32:
            continue
        inputs = _inputs(run)
        if max(x.numel() for x in _tensors(inputs)) <= SMALL:
            step_of(run, inputs)()
    torch.cuda.synchronize()


def record_path(device: str, commit: str, dirty: bool | None, day: datetime.date) -> Path:
    """bench/results/<gpu>/<date>-<commit>[-dirty].json"""
    folder = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RESULTS / folder / f"{day.isoformat()}-{commit}{'-dirty' if dirty else ''}.json"


def gate(device: str, commit: str | None = None, capture: Capture = clock.capture) -> dict[str, Any]:
    """The whole gate; gives its record."""
    head, dirty = (commit, None) if commit else record.commit()
    environment = {**record.environment(device), "roofs": roofs.roofs(device)}
    barrier = barrier_check() if device == "cuda" else {"skipped": "no GPU"}
    print(f"barrier: {barrier}", flush=True)
    load, runs = ForeignLoad(), list(every_run((device,)))
    checks = {}
    for op in registry.OPS.values():
        checks[op.name] = check_op(op, [run for run in runs if run.op is op], capture)
        print(
            f"{op.name}: {'green' if green(checks[op.name]) else 'RED'} {checks[op.name]['checks']}",
            flush=True,
        )
        for kind, messages in checks[op.name]["failures"].items():
            print("".join(f"  {kind}: {message}\n" for message in messages), end="")
    memory = memory_check() if device == "cuda" else {"skipped": "no GPU"}
    found, refused = gated_figures(checks, points(device))
    passed = all(map(green, checks.values())) and not refused
    passed = passed and memory.get("passed", True) and barrier.get("passed", True)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": head,
        "dirty": dirty,
        "green": passed,
        "environment": environment,
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in DTYPES[device]],
        "checks": list(checks.values()),
        "memory_check": memory,
        "barrier_check": barrier,
        "figures": found,
        "refused": refused,
        "foreign_load": load.cores(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_gate", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the record (bench/results/<gpu>/...)")
    parser.add_argument("--commit", help="the commit's hash, where the checkout has no .git")
    parser.add_argument("--small-cases", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu gate: torch sees no CUDA device; run it on a machine with a GPU, with a CUDA build of torch")
        return 2
    if options.small_cases:
        small_cases()
        return 0
    result = gate("cuda", options.commit)
    today = datetime.datetime.now(datetime.UTC).date()
    path = options.out or record_path(result["environment"]["device"], result["commit"], result["dirty"], today)
    record.write_json(path, result)
    if result["figures"]:
        print(summary(result["figures"]))
    for refusal in result["refused"]:
        print(f"no figure for {refusal['point']}: {refusal['reason']}")
    print(f"{'green' if result['green'] else 'RED'}; written: {path}")
    return 0 if result["green"] else 1


if __name__ == "__main__":
    sys.exit(main())
