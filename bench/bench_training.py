"""Whole training steps against the plain PyTorch scripts that people write: `genai_fast.profiling.systems` lists them.

Each side runs in a process of its own, in turn (A B A B ...): settings of the allocator and of the library of matrix
products belong to a process, and so do its habits. Every side is measured as PyTorch comes and under
`genai_fast.tune_cpu()`, so that the effect of an allocator or another library is not credited to a kernel.
"""

import argparse
import contextlib
import copy
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import genai_fast
from bench.gpu_gate.training import autocast_of, red, variants
from bench.points import COMPILED, DEVICE, FUSED
from bench.report import files
from bench.variants import ratios, walls
from genai_fast.kernels.common import onednn
from genai_fast.profiling import ForeignLoad, compare
from genai_fast.profiling.loops import EAGER
from genai_fast.profiling.systems import SYSTEMS
from genai_fast.training.step import PRECISIONS

TURNS = 3
ROUNDS, SECONDS = 3, 1.0  # of clocking in each turn, at least
STOCK, TUNED = "stock process", "tuned process"


def make_step(system: str, side: str, device: str) -> Callable[[], Any]:
    """One step on a batch that stays the same, as one call."""
    torch.manual_seed(0)
    return variants(SYSTEMS[system], device)[side]()


class Worker:
    """A process that holds one side's step, warmed up, and clocks it when asked."""

    def __init__(self, system: str, side: str, setting: str, device: str) -> None:
        command, pipe = [sys.executable, "-m", "bench.bench_training", system, side, setting, device], subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=files.ROOT, stdin=pipe, stdout=pipe, text=True)
        self._read()

    def clock(self) -> float:
        """Median seconds a step."""
        self._process.stdin.write("clock\n")
        self._process.stdin.flush()
        return self._read()["seconds"]

    def _read(self) -> dict[str, float]:
        for line in self._process.stdout:  # a library may print something first
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{' '.join(self._process.args)}: ended with {self._process.wait()}, its message is above")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def sides(system: str) -> list[tuple[str, str]]:
    """What is measured, and in which process: the others are peers as PyTorch comes."""
    chosen = SYSTEMS[system]
    more = [autocast_of(chosen)] if chosen.config.precision == "bfloat16" else []
    more += [COMPILED] if COMPILED in variants(chosen, "cpu") else []
    return [*((side, setting) for setting in (STOCK, TUNED) for side in (EAGER, FUSED)), *((m, STOCK) for m in more)]


@contextlib.contextmanager
def workers(system: str, device: str) -> Iterator[tuple[dict[tuple[str, str], Worker], dict[str, str]]]:
    """One for each side and setting, warmed up one after the other; and why a compiled one is not there."""
    with contextlib.ExitStack() as stack:
        found, skipped = {}, {}
        for side, setting in sides(system):
            try:
                found[side, setting] = stack.enter_context(contextlib.closing(Worker(system, side, setting, device)))
            except RuntimeError as error:
                if side != COMPILED:
                    raise
                skipped[side] = str(error)[:200]
        yield found, skipped


@functools.cache
def figures(system: str, device: str) -> tuple[dict[str, Any], ...]:
    """One figure for each setting of both sides, and one of plain eager against everything that helps."""
    load = ForeignLoad()
    with workers(system, device) as (running, skipped):
        times: dict[tuple[str, str], list[float]] = {pair: [] for pair in running}
        for _ in range(TURNS):
            for pair, worker in running.items():
                times[pair].append(worker.clock())
    seconds = {pair: statistics.median(values) for pair, values in times.items()}
    chosen, found = SYSTEMS[system], []
    case = f"{system}-{chosen.batch}x{'x'.join(map(str, chosen.shape))}"
    head = {"op": "training step", "dtype": chosen.config.precision, "device": device, "foreign_load": load.cores()}
    mixed = "eager stock, fused tuned"
    for name, theirs, ours in ((STOCK, STOCK, STOCK), (TUNED, TUNED, TUNED), (mixed, STOCK, TUNED)):
        times = {side: t for (side, setting), t in seconds.items() if setting == theirs and side != FUSED}
        times[FUSED] = seconds[FUSED, ours]
        left_out = {side: {"skipped": why} for side, why in skipped.items() if theirs == STOCK}
        found.append({**head, "case": f"{case}, {name}", "variants": walls(times) | left_out, "ratio": ratios(times)})
    return tuple(found)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.benchmark(group="training step", max_time=0.5, min_rounds=3)
def test_training_step(benchmark, figures_of_session, system):
    precision = SYSTEMS[system].config.precision
    if DEVICE == "cpu" and precision != "float32" and not onednn.serves(PRECISIONS[precision]):
        pytest.skip(f"this processor does not support {precision}: PyTorch emulates it, far slower than float32")
    assert not red(SYSTEMS[system], DEVICE), "no clock on a red gate"
    if not benchmark.disabled:
        found = figures(system, DEVICE)
        figures_of_session.extend(copy.deepcopy(found))
        benchmark.extra_info.update(found[0], settings=[f["ratio"] for f in found])
    benchmark(make_step(system, FUSED, DEVICE))


def main() -> None:
    """What a `Worker` starts: says when it is ready, then clocks the step for each line that it reads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("side")
    parser.add_argument("setting", choices=(STOCK, TUNED))
    parser.add_argument("device")
    options = parser.parse_args()
    if options.setting == TUNED:
        genai_fast.tune_cpu()
    step = make_step(options.system, options.side, options.device)
    compare({"step": step}, rounds=2)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        seconds = compare({"step": step}, rounds=ROUNDS, seconds=SECONDS, warm_up=1).timings["step"].median
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
