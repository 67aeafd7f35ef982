"""A training step in plain PyTorch, in a process of its own with PyTorch's settings: what one has without this library.

The allocator's habits and the library of matrix products belong to a process, and `tune_cpu` changes both.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from genai_fast.models.registry import RECIPES
from genai_fast.profiling.compare import compare
from genai_fast.profiling.systems import System


def stock_seconds(system: System, device: str, rounds: int) -> float:
    """Median seconds of a plain step. Raises RuntimeError: the process failed, with what it said."""
    given = json.dumps({"system": dataclasses.asdict(system), "device": device, "rounds": rounds})
    command = [sys.executable, "-m", "genai_fast.profiling.stock"]
    # Also of a checkout that is not installed.
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=variables)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Read a system from stdin, write the seconds of its plain step."""
    given = json.load(sys.stdin)
    values = given["system"]
    config = RECIPES[values["recipe"]].config(**values.pop("config"))
    system = System(**values | {"config": config, "shape": tuple(values["shape"])})
    step, batch = system.plain(given["device"]), system.inputs(given["device"])
    timing = compare({"plain": lambda: step(*batch)}, rounds=given["rounds"]).timings["plain"]
    print(json.dumps(timing.median))


if __name__ == "__main__":
    main()
