"""Kills a training process at random moments, resumes it, and compares its end with that of a run never killed.

    python -m bench.kill --kills 20 --recipe vae

Weights, optimizer, random generators, progress and metrics.jsonl must come out the same to the last bit.
"""

import argparse
import contextlib
import json
import os
import pydoc_data.topics
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from genai_fast.runs.run import CONFIG
from genai_fast.training import checkpoint
from genai_fast.training.loop import METRICS

# What is measured by a clock, in metrics.jsonl and in a checkpoint's progress: the rest must be equal.
CLOCKS = {"samples_per_second", "tokens_per_second", "data_wait", "step_ms", "seconds", "waited"}
RECIPES = {
    "vae": ["--data", "digits", "--batch-size", "256", "--hidden", "1000", "--latent", "4"],
    "lstm": [
        "--data", "words.txt", "--tokenizer", "byte", "--batch-size", "4", "--block", "16", "--embedding", "16",
        "--hidden", "128", "--dropout", "0.1", "--sample-every", "0",
    ],
}  # fmt: skip
SHARED = ["--threads", "1", "--log-every", "1", "--checkpoint-every", "2"]
MOMENTS = ("time", "step", "save")
_TEXT = 3000  # characters of words.txt
_PATIENCE = 300.0  # seconds that a process may take


def survive(
    recipe: str, moments: Sequence[str], epochs: int, folder: Path, seed: int = 0, say: Callable[[str], None] = print
) -> list[str]:
    """Train `recipe` in `folder` twice, once killed at each of `moments` and resumed; returns what differs at the end.

    A moment is "time" (any in the first half of what the run takes), "step" (some steps on) or "save" (while a
    checkpoint is written).
    """
    (folder / "words.txt").write_text(pydoc_data.topics.topics["while"][:_TEXT], encoding="utf-8")
    draw = random.Random(seed)
    flags = [*RECIPES[recipe], *SHARED, "--epochs", str(epochs)]
    start = time.monotonic()
    _finish(_start(recipe, flags, "straight", folder), "straight")
    taken = time.monotonic() - start
    say(f"straight: {taken:.1f} s, {checkpoint.latest(folder / 'runs' / 'straight').name}")
    run = folder / "runs" / "killed"
    for number, moment in enumerate(moments, 1):
        process = _start(recipe, flags, "killed", folder)
        start = time.monotonic()
        reached = _wait(process, run, moment, draw, taken)
        if not reached:
            return [f"the run ended before kill {number} ({moment}): {_finish(process, 'killed')}; remedy: more epochs"]
        process.kill()
        process.communicate()
        say(f"kill {number:2d}: {moment}, {time.monotonic() - start:5.2f} s after the start; left: {_left(run)}")
    said = _finish(_start(recipe, flags, "killed", folder), "killed")
    say(f"end: {said}")
    return differences(folder / "runs" / "straight", run)


def differences(a: Path, b: Path) -> list[str]:
    """In what the newest checkpoints, metrics and files of two runs differ."""
    newest = [checkpoint.latest(run) for run in (a, b)]
    states = [checkpoint.read_state(path) for path in newest]
    pairs: dict[str, tuple[Any, Any]] = {
        "checkpoints": tuple([path.name for path in checkpoint.found(run)] for run in (a, b)),
        "progress": tuple(unclocked(state["progress"]) for state in states),
        METRICS: tuple(metrics(run) for run in (a, b)),
        "files": tuple(sorted(p.name for p in run.iterdir() if p.name[0] != ".") for run in (a, b)),
    }
    for key in ("step", "best", "optimizer", "environment", "routes"):
        pairs[key] = tuple(state[key] for state in states)
    differing = [key for key, (x, y) in pairs.items() if x != y]
    for name in ("model.safetensors", "training.safetensors"):
        x, y = (safetensors.torch.load_file(path / name) for path in newest)
        differing += [f"{name}: {k}" for k in x.keys() | y.keys() if k not in x or k not in y or not _same(x[k], y[k])]
    return differing


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without what a clock measured."""
    return [unclocked(json.loads(line)) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]


def unclocked(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in CLOCKS}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the last bit."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.numpy().tobytes() == b.numpy().tobytes()


def _start(recipe: str, flags: Sequence[str], run: str, folder: Path) -> subprocess.Popen:
    more = ["--resume"] if (folder / "runs" / run / CONFIG).exists() else flags
    command = [sys.executable, "-m", "genai_fast", "train", recipe, "--run", run, *more]
    how = {"env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, "cwd": folder, "text": True}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def _finish(process: subprocess.Popen, run: str) -> str:
    """Wait until it ends by itself; what it said."""
    try:
        out, error = process.communicate(timeout=_PATIENCE)
    finally:
        process.kill()
    if process.returncode:
        raise RuntimeError(f"{run}: exit code {process.returncode}:\n{error}")
    return out.splitlines()[0]


def _wait(process: subprocess.Popen, run: Path, moment: str, draw: random.Random, taken: float) -> bool:
    """Sleep until the moment, of a run that takes `taken` seconds; False if the process ended before."""
    end = time.monotonic() + _PATIENCE
    if moment == "time":
        time.sleep(draw.uniform(0.0, taken / 2))
        return process.poll() is None
    before, wanted = _written(run, moment), draw.randint(1, 4)
    came: set[tuple[str, int]] = set()
    while len(came) < wanted:
        if process.poll() is not None or time.monotonic() > end:
            return False
        came |= _written(run, moment) - before
        time.sleep(0.0005)
    time.sleep(draw.uniform(0.0, 0.02 if moment == "step" else 0.005))
    return process.poll() is None


def _written(run: Path, moment: str) -> set[tuple[str, int]]:
    """The state of metrics.jsonl (name and time), or the checkpoints in the making (name and number of the folder)."""
    there = set()
    for path in run.glob(METRICS if moment == "step" else ".checkpoint-*.new"):
        with contextlib.suppress(FileNotFoundError):  # it is gone by now
            status = path.stat()
            there.add((path.name, status.st_mtime_ns if moment == "step" else status.st_ino))
    return there


def _left(run: Path) -> str:
    """What a kill left, in words."""
    if not (run / CONFIG).exists():
        return "no run yet"
    stand = checkpoint.found(run)
    hidden = [p.name for p in run.glob(".checkpoint-*")]
    return ", ".join([stand[0].name if stand else "no checkpoint yet", *hidden])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kill", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=RECIPES, default="vae")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed).choices(MOMENTS, k=options.kills)
    with tempfile.TemporaryDirectory() as folder:
        found = survive(options.recipe, moments, 4 + 2 * options.kills, Path(folder), options.seed)
    print(f"{options.kills} kills: {'; '.join(found) or 'weights, optimizer and metrics equal to the last bit'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
