"""The GPU gate: everything that only a GPU can prove, then the figures.

    python -m bench.gpu_gate [--minutes 8] [--continue] [--stages a,b,...] [--out FILE.json] [--commit HASH] [--jobs N]

The stages, in order; each is the module of its name here:

barrier   the barrier between steps in the launches of gru and lstm: whether they may take all steps in one launch from
          then on depends on it, so it is always checked first
runs      every case and dtype of each op that has a Triton kernel: numerics on the device, second derivatives, two runs
          bitwise equal, capture and replay as a CUDA graph
large     tensors of more than 2^31 elements
parity    fifty steps of training against plain PyTorch
figures   of each op that passed all its runs, beside its eager peers
training  figures of whole training steps
decoding  figures of a GPT that generates text
compiled  the ops' figures with torch.compile
tuning    the fastest settings of each launch, written to kernels/<op>/tuned/<gpu>.json
memory    a memory check of small cases if compute-sanitizer is installed

When the minutes are over it stops, and `--continue` resumes: with what was not reached, once more with what failed for
lack of memory or time, and with figures whose launches were tuned after they had been measured. Everything is in one
JSON record, bench/results/<gpu>/<date>-<commit>.json; the files that were written are named at the end. Exit code:
0 green, 1 red, 2 no GPU, 3 not through yet.
"""

import argparse
import datetime
import json
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench import recording
from bench.gpu_gate import decoding, large, parity, training, tuning, worker
from bench.gpu_gate.barrier import barrier_check
from bench.gpu_gate.gate import Gate, Tasks
from bench.gpu_gate.memory import memory_check
from bench.points import DTYPES, Point, points
from bench.report import files, tables
from bench.report.records import failures
from genai_fast.profiling import ForeignLoad
from genai_fast.profiling.machine import device_name
from genai_fast.testing import Run, every_run

STAGES = ("barrier", "runs", "large", "parity", "figures", "training", "decoding", "compiled", "tuning", "memory")


def tasks_of(device: str, runs: Iterable[Run], todo: Iterable[Point]) -> Tasks:
    """Everything to be done on a device: one process does the runs of an op and dtype, as they share kernels."""
    runs, todo = list(runs), list(todo)
    # On a GPU the reference is PyTorch's own code: it proves nothing, unless there is nothing else.
    served = {run.op.name for run in runs if run.backend == "triton"} if device == "cuda" else set()
    batches: dict[Any, list[str]] = defaultdict(list)
    for run in runs:
        if run.backend != "reference" or run.op.name not in served:
            batches[run.op.name, run.dtype].append(str(run))
    found = {
        "runs": list(batches.values()),
        # One process for all points: starting one takes longer than measuring.
        "figures": [[str(point) for point in todo]],
        "compiled": [[str(point) for point in todo if point.op.compiled]],
    }
    searches: dict[str, list[str]] = defaultdict(list)
    for task, point, _ in tuning.tasks(device) if device == "cuda" else ():
        searches[point.op.name].append(task)
    on_a_gpu = {
        "large": [[*large.LARGE]],  # in turn: the device's memory does not hold two
        "parity": [[name] for name in parity.TOLERANCE],
        "training": [[name] for name in training.MEASURED],
        "decoding": [[name] for name in decoding.MEASURED],
        "tuning": list(searches.values()),
    }
    return found | (on_a_gpu if device == "cuda" else dict.fromkeys(on_a_gpu, ()))


def begin(device: str, commit: str | None) -> dict[str, Any]:
    """The head of a new record."""
    found = {
        **recording.begin(device, commit),
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in DTYPES[device]],
    }
    worker.free()  # the stages' processes need all of the device's memory
    return found


def barrier(gate: Gate, deadline: float) -> None:
    """Without proof that the barrier holds, gru and lstm take one launch per step from here on."""
    try:
        gate.check("barrier_check", barrier_check, deadline)
    finally:
        if not gate.content.get("barrier_check", {}).get("passed", False):
            os.environ["GENAI_FAST_SEQUENCE"] = "0"


def tune(gate: Gate, deadline: float) -> None:
    """Search what was not searched yet, and write what was found."""
    try:
        gate.run_stage("tuning", deadline)
    finally:
        gate.write_tuned()


def perform(gate: Gate, minutes: float, jobs: int, stages: Iterable[str] = STAGES) -> None:
    """Whatever is left of these stages, until the minutes are over."""
    begun, load, content, wanted = time.monotonic(), ForeignLoad(), gate.content, {"barrier", *stages}
    deadline, spent = begun + 60 * minutes, content.get("minutes", 0.0)
    special = {
        "barrier": lambda: barrier(gate, deadline),
        "tuning": lambda: tune(gate, deadline),
        "memory": lambda: gate.check("memory_check", memory_check, deadline),
    }
    try:
        gate.guarded("tuned", gate.write_tuned)  # files that an earlier part wrote may be missing on this machine
        for stage in (stage for stage in STAGES if stage in wanted):
            print(f"{stage}: begun after {time.monotonic() - begun:.0f} s", flush=True)
            gate.guarded(stage, special.get(stage) or (lambda stage=stage: gate.run_stage(stage, deadline, jobs)))
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
    parser.add_argument("--commit", help="the commit's hash, if the checkout has no .git")
    jobs, what = max(1, min(12, (os.cpu_count() or 2) - 2)), "processes that check ops at a time: most of that time"
    parser.add_argument("--jobs", type=int, default=jobs, help=f"{what} compiles kernels; default here: %(default)s")
    parser.add_argument(
        "--stages", type=stages_of, default=STAGES, metavar="a,b,...", help=f"only these of {','.join(STAGES)}"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu gate: torch sees no CUDA device; run it on a machine with a GPU, with a CUDA build of torch")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its processes end and the record is saved
    head, dirty = (options.commit, None) if options.commit else files.commit()
    today = datetime.datetime.now(datetime.UTC).date()
    path = options.out or recording.default_path(device_name("cuda"), head, dirty, today)
    if options.go_on and not options.out:
        path = max(path.parent.glob(f"*-{head}{'-dirty' if dirty else ''}.json"), default=path)
    if options.go_on and not path.exists():
        parser.error(f"--continue: expected a record of commit {head}, {path} does not exist; remedy: leave it out")
    content = json.loads(path.read_text()) if options.go_on else begin("cuda", options.commit)
    if content["commit"] != head:
        parser.error(f"--continue: expected a record of commit {head}, {path} is of {content['commit']}")
    gate = Gate(path, content, tasks_of("cuda", every_run(("cuda",)), points("cuda")), "cuda")
    if options.go_on:
        gate.retry()
    for name, value in content["environment"].items():
        print(f"{name}: {value}")
    try:
        perform(gate, options.minutes, options.jobs, options.stages)
        if figures := [f for f in content["figures"].values() if "variants" in f]:
            print(tables.summary(figures))
        for point, result in content["figures"].items():
            for why in failures(result).values():
                print(f"no figure for {point}: {why}")
        for stage, names in gate.left().items():
            print(f"left, {stage}: {len(names)}")
        print("green" if gate.green() else "RED" if gate.through() else "not through: --continue")
    finally:  # the machine may be gone soon: copy these from it
        for file in sorted(gate.written):
            print(f"written: {file}", flush=True)
    return 0 if gate.green() else 1 if gate.through() else 3


if __name__ == "__main__":
    sys.exit(main())
