"""A training step in a process of its own: in plain PyTorch as it comes, and under `tune_cpu` beside ours.

The allocator's habits and the library of matrix products belong to a process, and `tune_cpu` changes both; so does what
ran there before.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from genai_fast.cpu import tune_cpu
from genai_fast.models.registry import RECIPES
from genai_fast.profiling.compare import compare
from genai_fast.profiling.systems import System


def measured(system: System, device: str, rounds: int, tuned: bool) -> dict[str, float]:
    """Median seconds a step: of "eager", and if `tuned` of "fused" too, in turn.

    Raises RuntimeError: the process failed, with what it said.
    """
    given = {"system": dataclasses.asdict(system), "device": device, "rounds": rounds, "tuned": tuned}
    command = [sys.executable, "-m", "genai_fast.profiling.stock"]
    # Also of a checkout that is not installed.
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, env=variables)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Read a system from stdin, write the seconds of its steps."""
    given = json.load(sys.stdin)
    values, device = given["system"], given["device"]
    config = RECIPES[values["recipe"]].config(**values.pop("config"))
    system = System(**values | {"config": config, "shape": tuple(values["shape"])})
    if given["tuned"] and device == "cpu":
        tune_cpu()
    batch, steps = system.inputs(device), {"eager": system.plain(device)}
    if given["tuned"]:
        steps["fused"] = system.fused(device)
    calls = {name: functools.partial(step, *batch) for name, step in steps.items()}
    # Five samples of warm-up: on CUDA, the graph is captured by then.
    timings = compare(calls, rounds=given["rounds"], warm_up=5).timings
    print(json.dumps({name: timing.median for name, timing in timings.items()}))


if __name__ == "__main__":
    main()
