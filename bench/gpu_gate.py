"""The GPU gate: everything that only a GPU can prove, then the figures.

    python -m bench.gpu_gate [--minutes 8] [--continue] [--out FILE.json] [--commit HASH] [--jobs N]

In this order: the barrier in gru's and lstm's launches (bench.barrier); of each op every case and dtype (bench.checks:
numerics on the device, second derivatives, two runs bitwise equal, capture and replay as a CUDA graph); tensors of more
than 2^31 elements (bench.large); fifty steps of training against plain PyTorch (bench.parity); the fastest settings of
each launch, which go to kernels/<op>/tuned/<gpu>.json (bench.tuning); a memory check of small cases where
compute-sanitizer is installed; the figures of each op that passed all its checks, those of whole training steps
(bench.training_figures) and of a GPT that writes (bench.decoding), and the ops' with torch.compile. When the minutes
are over it stops, and `--continue` goes on from there. One JSON record says all, in
bench/results/<gpu>/<date>-<commit>.json. Exit code: 0 green, 1 red, 2 no GPU, 3 not through yet.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench import decoding, isolated, large, parity, record, roofs, training_figures, tuning
from bench.checks import inputs_of, step_of, tensors
from bench.points import COMPILED, DTYPES, Point, figures, points, red
from bench.records import failures
from bench.report import summary
from genai_fast.profiling import ForeignLoad
from genai_fast.testing import Run, every_run

RESULTS = Path(__file__).parent / "results"
SMALL = 20_000  # elements of the largest input that the memory checker is given: it slows kernels a hundredfold
_SAVED = 15.0  # seconds from one writing of the record to the next

# A stage asks which of its tasks were done, and gives a process that does the others.
STAGES = {
    "runs": "bench.checks", "large": "bench.large", "parity": "bench.parity", "tuning": "bench.tuning",
    "training": "bench.training_figures", "decoding": "bench.decoding",
}  # fmt: skip

Tasks = dict[str, list[list[str]]]  # by stage, in batches


class Gate:
    """The record of a gate as it grows, on disk and here.

    `tasks` are what must be done: stage -> batches of tasks, the tasks of a batch in one process.
    """

    def __init__(
        self, path: Path, content: dict[str, Any], tasks: dict[str, list[list[str]]], todo: list[Point]
    ) -> None:
        self.path, self.content, self.tasks, self.todo = path, content, tasks, todo
        for stage in tasks:
            content.setdefault(stage, {})
        content.setdefault("figures", [])
        content.setdefault("refused", [])
        self._saved = time.monotonic()

    def run_stage(self, stage: str, device: str, deadline: float, jobs: int) -> None:
        """Do what is not done yet of a stage, until the deadline."""
        known, silent = self.content[stage], isolated.SILENT
        if stage == "training":
            self._refuse_training()
        if stage in ("training", "decoding"):
            silent = training_figures.SILENT  # compilers take their time
        left = [[task for task in batch if task not in known] for batch in self.tasks[stage]]
        command = [sys.executable, "-m", STAGES[stage], device]

        def done(task: str, result: dict[str, Any]) -> None:
            known[task] = result
            for kind, message in failures(result).items():
                print(f"RED {task}: {kind}: {message}", flush=True)
            self.save()

        left = sorted(filter(None, left), key=len, reverse=True)
        isolated.run(command, left, done, jobs=jobs, deadline=deadline, silent=silent)
        count = sum(len(batch) for batch in self.tasks[stage])
        bad = sum(bool(failures(result)) for result in known.values())
        print(f"{stage}: {len(known)} of {count} done, {bad} red", flush=True)

    def _refuse_training(self) -> None:
        """No figures of a training step whose curve is wrong."""
        curves = self.content.get("parity", {})
        for task in (task for batch in self.tasks["training"] for task in batch):
            curve = training_figures.parity_of(task)
            if failures(curves.get(curve, {})):
                self.content["training"].setdefault(task, {"failures": {"parity": f"that of {curve} is red"}})

    def measure(
        self, deadline: float, compiled: bool, measure: Callable[..., dict[str, Any]] = figures,
        refuse: Callable[[Point], str] = red,
    ) -> None:  # fmt: skip
        """Figures of the points whose op is green, until the deadline."""
        content, names = self.content, {op: self.op_runs(op) for op in {point.op.name for point in self.todo}}
        for point in self.todo:
            if time.monotonic() >= deadline:
                return
            mine = [f for f in content["figures"] if f["point"] == str(point)]
            if any(COMPILED in f["variants"] or not compiled for f in mine) or self._refused(point):
                continue
            if compiled and not point.op.compiled:
                continue
            reason = "" if self.op_green(names[point.op.name]) else f"the gate of {point.op} is red, or not through"
            try:
                reason = reason or refuse(point)
                found = {} if reason else measure(point, compiled=compiled)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"[:1000]
            content["figures"] = [f for f in content["figures"] if reason or f["point"] != str(point)]
            if reason:
                content["refused"].append({"point": str(point), "reason": reason})
            else:
                content["figures"].append({"point": str(point), **found})
            self.save()

    def _refused(self, point: Point) -> bool:
        return any(r["point"] == str(point) for r in self.content["refused"])

    def op_runs(self, op: str) -> list[str]:
        return [task for batch in self.tasks["runs"] for task in batch if task.startswith(f"{op}-")]

    def op_green(self, names: list[str]) -> bool:
        """Whether an op passed everything, and anything was checked at all."""
        known = self.content["runs"]
        return bool(names) and all(name in known and not failures(known[name]) for name in names)

    def left(self) -> dict[str, list[str]]:
        """What was not done yet, by stage; figures are without torch.compile, for which there may be no time."""
        content, found = self.content, {}
        for stage, batches in self.tasks.items():
            found[stage] = [task for batch in batches for task in batch if task not in content[stage]]
        done = {f["point"] for f in content["figures"]} | {r["point"] for r in content["refused"]}
        found["figures"] = [str(point) for point in self.todo if str(point) not in done]
        found["checks"] = [] if "memory_check" in content else ["memory_check"]
        return {stage: names for stage, names in found.items() if names}

    def through(self) -> bool:
        """Whether everything was done."""
        return not self.left()

    def green(self) -> bool:
        """Whether everything was done and is right."""
        content = self.content
        bad = any(failures(result) for stage in self.tasks for result in content[stage].values())
        checks = (content.get(name, {}).get("passed", True) for name in ("memory_check", "barrier_check"))
        return self.through() and not bad and not content["refused"] and all(checks)

    def save(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self._saved > _SAVED:
            self.content.update(green=self.green(), through=self.through(), left=self.left())
            record.write_json(self.path, self.content)
            self._saved = time.monotonic()


def tasks_of(device: str, runs: Iterable[Run]) -> Tasks:
    """Everything to be done on a device: the runs of one op and dtype stay together, as they share kernels."""
    batches: dict[Any, list[str]] = defaultdict(list)
    for run in runs:
        batches[run.op.name, run.dtype].append(str(run))
    searches: dict[str, list[str]] = defaultdict(list)
    for task, point, _ in tuning.tasks(device) if device == "cuda" else ():
        searches[point.op.name].append(task)
    return {
        "runs": list(batches.values()),
        "large": [[name] for name in large.LARGE] if device == "cuda" else [],
        "parity": [[name] for name in parity.TOLERANCE] if device == "cuda" else [],
        "tuning": list(searches.values()),
        "training": [[name] for name in training_figures.MEASURED] if device == "cuda" else [],
        "decoding": [[name] for name in decoding.MEASURED] if device == "cuda" else [],
    }


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
            [*command, "--small-cases"], cwd=record.ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
    except subprocess.TimeoutExpired:
        return {"skipped": "compute-sanitizer took more than 600 s"}
    return {"passed": done.returncode == 0, "output": (done.stdout + done.stderr)[-2000:]}


def barrier_check(limit: float = 300.0) -> dict[str, Any]:
    """bench.barrier in a process of its own, which is ended where it waits for ever."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.barrier"], cwd=record.ROOT, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired as expired:
        said = (expired.stdout or b"").decode(errors="replace")
        return {"passed": False, "output": f"{said[-2000:]}no end after {limit:g} s"}
    if done.returncode == 2:
        return {"skipped": done.stdout.strip() or "no layer fits in one launch here"}
    return {"passed": done.returncode == 0, "output": (done.stdout + done.stderr)[-2000:]}


def small_cases() -> None:
    """What runs under the memory checker: each op's small cases in float32."""
    for run in every_run(("cuda",)):
        if run.backend != "triton" or run.dtype is not torch.float32:
            continue
        inputs = inputs_of(run)
        if max(x.numel() for x in tensors(inputs)) <= SMALL:
            step_of(run, inputs)()
    torch.cuda.synchronize()


def record_path(device: str, commit: str, dirty: bool | None, day: datetime.date) -> Path:
    """bench/results/<gpu>/<date>-<commit>[-dirty].json"""
    folder = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RESULTS / folder / f"{day.isoformat()}-{commit}{'-dirty' if dirty else ''}.json"


def begin(device: str, commit: str | None) -> dict[str, Any]:
    """The head of a new record."""
    head, dirty = (commit, None) if commit else record.commit()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": head,
        "dirty": dirty,
        "environment": {**record.environment(device), "roofs": roofs.roofs(device)},
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in DTYPES[device]],
    }


def perform(gate: Gate, device: str, minutes: float, jobs: int) -> None:
    """Whatever is left of the gate, until the minutes are over."""
    begun, load, content = time.monotonic(), ForeignLoad(), gate.content
    deadline = begun + 60 * minutes
    if "barrier_check" not in content:
        content["barrier_check"] = barrier_check() if device == "cuda" else {"skipped": "no GPU"}
        print(f"barrier: {content['barrier_check']}", flush=True)
    if not content["barrier_check"].get("passed", False):
        os.environ["GENAI_FAST_SEQUENCE"] = "0"  # gru and lstm go step by step from here on
    for stage in ("runs", "large", "parity"):
        gate.run_stage(stage, device, deadline, jobs)
    gate.run_stage("tuning", device, deadline, 1)
    if device == "cuda":
        tuning.write(content["tuning"].values(), torch.device("cuda"), content["commit"])
    if "memory_check" not in content and time.monotonic() < deadline:
        content["memory_check"] = memory_check() if device == "cuda" else {"skipped": "no GPU"}
    gate.measure(deadline, compiled=False)
    for stage in ("training", "decoding"):
        gate.run_stage(stage, device, deadline, 1)
    gate.measure(deadline, compiled=True)
    content["foreign_load"] = load.cores()
    content["minutes"] = round(content.get("minutes", 0.0) + (time.monotonic() - begun) / 60, 1)
    gate.save(now=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_gate", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="after which it stops; default: %(default)s")
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="with the newest record of this GPU and commit, or --out"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the record (bench/results/<gpu>/...)")
    parser.add_argument("--commit", help="the commit's hash, where the checkout has no .git")
    parser.add_argument(
        "--jobs", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)),
        help="processes that check ops at a time: most of that time compiles kernels; default here: %(default)s",
    )  # fmt: skip
    parser.add_argument("--small-cases", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu gate: torch sees no CUDA device; run it on a machine with a GPU, with a CUDA build of torch")
        return 2
    if options.small_cases:
        small_cases()
        return 0
    head, dirty = (options.commit, None) if options.commit else record.commit()
    today = datetime.datetime.now(datetime.UTC).date()
    path = options.out or record_path(record.device_name("cuda"), head, dirty, today)
    if options.go_on and not options.out:
        path = max(path.parent.glob(f"*-{head}{'-dirty' if dirty else ''}.json"), default=path)
    if options.go_on and not path.exists():
        parser.error(f"--continue: expected a record of commit {head}, {path} does not exist; remedy: leave it out")
    content = json.loads(path.read_text()) if options.go_on else begin("cuda", options.commit)
    if content["commit"] != head:
        parser.error(f"--continue: expected a record of commit {head}, {path} is of {content['commit']}")
    gate = Gate(path, content, tasks_of("cuda", every_run(("cuda",))), list(points("cuda")))
    perform(gate, "cuda", options.minutes, options.jobs)
    if content["figures"]:
        print(summary(content["figures"]))
    for refusal in content["refused"]:
        print(f"no figure for {refusal['point']}: {refusal['reason']}")
    print(f"{'green' if gate.green() else 'not through: --continue' if not gate.through() else 'RED'}; written: {path}")
    return 0 if gate.green() else 1 if gate.through() else 3


if __name__ == "__main__":
    sys.exit(main())
