"""The GPU gate: everything that only a GPU can prove, then the figures.

    python -m bench.gpu_gate [--minutes 8] [--continue] [--stages a,b,...] [--out FILE.json] [--commit HASH] [--jobs N]

In this order, which are also the names of the stages:

barrier   the one between steps in gru's and lstm's launches (bench.barrier): how they go in all that follows hangs on
          it, so it is checked first whatever is asked for
runs      every case and dtype of each op that has a Triton kernel (bench.checks): numerics on the device, second
          derivatives, two runs bitwise equal, capture and replay as a CUDA graph
large     tensors of more than 2^31 elements (bench.large)
parity    fifty steps of training against plain PyTorch (bench.parity)
figures   of each op that passed all its runs, beside its eager peers (bench.op_figures)
training  figures of whole training steps (bench.training_figures)
decoding  figures of a GPT that writes (bench.decoding)
compiled  the ops' figures with torch.compile
tuning    the fastest settings of each launch, which go to kernels/<op>/tuned/<gpu>.json (bench.tuning)
memory    a memory check of small cases where compute-sanitizer is installed

When the minutes are over it stops, and `--continue` goes on from there: with what was not reached, once more with what
failed for lack of memory or time, and with figures whose launches were tuned after they had been measured. One JSON
record says all, in bench/results/<gpu>/<date>-<commit>.json; the files that were written are named at the end. Exit
code: 0 green, 1 red, 2 no GPU, 3 not through yet.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench import decoding, gate_checks, isolated, large, parity, record, roofs, training_figures, tuning
from bench.gating import Gate, Tasks
from bench.points import DTYPES, points
from bench.report import summary
from genai_fast.profiling import ForeignLoad
from genai_fast.testing import Run, every_run

RESULTS = Path(__file__).parent / "results"
STAGES = ("barrier", "runs", "large", "parity", "figures", "training", "decoding", "compiled", "tuning", "memory")


def tasks_of(device: str, runs: Iterable[Run]) -> Tasks:
    """Everything to be done on a device: the runs of one op and dtype stay together, as they share kernels."""
    runs = list(runs)
    # On a GPU the reference is PyTorch's own code: it proves nothing, unless there is nothing else.
    served = {run.op.name for run in runs if run.backend == "triton"} if device == "cuda" else set()
    batches: dict[Any, list[str]] = defaultdict(list)
    for run in runs:
        if run.backend != "reference" or run.op.name not in served:
            batches[run.op.name, run.dtype].append(str(run))
    searches: dict[str, list[str]] = defaultdict(list)
    for task, point, _ in tuning.tasks(device) if device == "cuda" else ():
        searches[point.op.name].append(task)
    return {
        "runs": list(batches.values()),
        "large": [[*large.LARGE]] if device == "cuda" else [],  # one after the other: the device holds no two
        "parity": [[name] for name in parity.TOLERANCE] if device == "cuda" else [],
        "training": [[name] for name in training_figures.MEASURED] if device == "cuda" else [],
        "decoding": [[name] for name in decoding.MEASURED] if device == "cuda" else [],
        "tuning": list(searches.values()),
    }


def record_path(device: str, commit: str, dirty: bool | None, day: datetime.date) -> Path:
    """bench/results/<gpu>/<date>-<commit>[-dirty].json"""
    folder = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RESULTS / folder / f"{day.isoformat()}-{commit}{'-dirty' if dirty else ''}.json"


def begin(device: str, commit: str | None) -> dict[str, Any]:
    """The head of a new record."""
    head, dirty = (commit, None) if commit else record.commit()
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": head,
        "dirty": dirty,
        "environment": {**record.environment(device), "roofs": roofs.roofs(device)},
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in DTYPES[device]],
    }
    isolated.free()  # the stages' processes need all of the device's memory
    return found


def barrier(gate: Gate, device: str, deadline: float) -> None:
    """Whether gru and lstm may go in one launch: if it is not proven they go step by step from here on."""
    content, left = gate.content, deadline - time.monotonic()
    if "barrier_check" not in content:
        try:
            found = gate_checks.barrier_check(left) if device == "cuda" else {"skipped": "no GPU"}
        except Exception as error:
            found = {"passed": False, "output": f"{type(error).__name__}: {error}"[:1000]}
        if found is not None:
            content["barrier_check"] = found
    print(f"barrier: {content.get('barrier_check', 'no time for it')}", flush=True)
    if not content.get("barrier_check", {}).get("passed", False):
        os.environ["GENAI_FAST_SEQUENCE"] = "0"


def tune(gate: Gate, device: str, deadline: float) -> None:
    """Search what was not searched yet, and write what was found."""
    try:
        gate.run_stage("tuning", device, deadline)
    finally:
        gate.write_tuned(device)


def memory(gate: Gate, device: str, deadline: float) -> None:
    left = deadline - time.monotonic()
    if "memory_check" not in gate.content and left > 0:
        found = gate_checks.memory_check(left) if device == "cuda" else {"skipped": "no GPU"}
        gate.content["memory_check"] = found
        print(f"memory: {found}", flush=True)


def perform(gate: Gate, device: str, minutes: float, jobs: int, stages: Iterable[str] = STAGES) -> None:
    """Whatever is left of these stages of the gate, until the minutes are over."""
    begun, load, content, wanted = time.monotonic(), ForeignLoad(), gate.content, {"barrier", *stages}
    deadline, spent = begun + 60 * minutes, content.get("minutes", 0.0)
    works = {
        "barrier": lambda: barrier(gate, device, deadline),
        "runs": lambda: gate.run_stage("runs", device, deadline, jobs),
        "large": lambda: gate.run_stage("large", device, deadline),
        "parity": lambda: gate.run_stage("parity", device, deadline, jobs),
        "figures": lambda: gate.measure(device, deadline, compiled=False),
        "training": lambda: gate.run_stage("training", device, deadline),
        "decoding": lambda: gate.run_stage("decoding", device, deadline),
        "compiled": lambda: gate.measure(device, deadline, compiled=True),
        "tuning": lambda: tune(gate, device, deadline),
        "memory": lambda: memory(gate, device, deadline),
    }
    try:
        # What was tuned before may have been left behind on another machine.
        gate.guarded("tuned", lambda: gate.write_tuned(device))
        for stage in (stage for stage in STAGES if stage in wanted):
            print(f"{stage}: begun after {time.monotonic() - begun:.0f} s", flush=True)
            gate.guarded(stage, works[stage])
    finally:
        content["foreign_load"] = load.cores()
        content["minutes"] = round(spent + (time.monotonic() - begun) / 60, 1)
        gate.save(now=True)


def stages_of(text: str) -> tuple[str, ...]:
    """Of "a,b,...", for argparse."""
    names = tuple(text.split(","))
    wrong = [name for name in names if name not in STAGES]
    if wrong:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong) or text!r}: expected some of {','.join(STAGES)}")
    return names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_gate", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="after which it stops; default: %(default)s")
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="with the newest record of this GPU and commit, or --out"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the record (bench/results/<gpu>/...)")
    parser.add_argument("--commit", help="the commit's hash, where the checkout has no .git")
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, min(12, (os.cpu_count() or 2) - 2)),
        help="processes that check ops at a time: most of that time compiles kernels; default here: %(default)s",
    )
    parser.add_argument(
        "--stages", type=stages_of, default=STAGES, metavar="a,b,...", help=f"only these of {','.join(STAGES)}"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu gate: torch sees no CUDA device; run it on a machine with a GPU, with a CUDA build of torch")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its processes end with it, and the record is saved
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
    if options.go_on:
        gate.retry()
    for name, value in content["environment"].items():
        print(f"{name}: {value}")
    try:
        perform(gate, "cuda", options.minutes, options.jobs, options.stages)
        if content["figures"]:
            print(summary(content["figures"]))
        for refusal in content["refused"]:
            print(f"no figure for {refusal['point']}: {refusal['reason']}")
        for stage, names in gate.left().items():
            print(f"left, {stage}: {len(names)}")
        print("green" if gate.green() else "RED" if gate.through() else "not through: --continue")
    finally:  # the machine may be gone soon: this is what to take away from it
        for file in sorted(gate.written):
            print(f"written: {file}", flush=True)
    return 0 if gate.green() else 1 if gate.through() else 3


if __name__ == "__main__":
    sys.exit(main())
