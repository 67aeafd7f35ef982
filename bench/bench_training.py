"""Whole training steps against the plain PyTorch scripts that people write: `genai_fast.profiling.systems` lists them.

Each side runs in a process of its own, in turn (A B A B ...): settings of the allocator and of the library of matrix
products belong to a process, and so do its habits. Every side is measured as PyTorch comes and under
`genai_fast.tune_cpu()`, so that the effect of an allocator or another library is not credited to a kernel.
"""

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import time
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

    def clock(self) -> tuple[float, float]:
        """Median seconds a step, and the seconds of processors that clocking used; the first time it warms up too."""
        self._process.stdin.write("clock\n")
        self._process.stdin.flush()
        found = self._read()
        return found["seconds"], found["used"]

    def _read(self) -> dict[str, float]:
        for line in self._process.stdout:  # a library may print something first
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{' '.join(self._process.args)}: ended with {self._process.wait()}, its message is above")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


Workers = dict[tuple[str, str], Worker]


def sides(system: str, quick: bool = False) -> list[tuple[str, str]]:
    """What is measured, and in which process: the others are peers as PyTorch comes."""
    chosen = SYSTEMS[system]
    if quick:
        return [(EAGER, STOCK), (FUSED, STOCK)]
    more = [autocast_of(chosen)] if chosen.config.precision == "bfloat16" else []
    more += [COMPILED] if COMPILED in variants(chosen, "cpu") else []
    return [*((side, setting) for setting in (STOCK, TUNED) for side in (EAGER, FUSED)), *((m, STOCK) for m in more)]


@contextlib.contextmanager
def workers(pairs: list[tuple[str, str]], system: str, device: str) -> Iterator[tuple[Workers, dict[str, str]]]:
    """One for each side and setting, started together, warmed up in turn; and why a compiled one is not there."""
    with contextlib.ExitStack() as stack:
        found, skipped = {p: stack.enter_context(contextlib.closing(Worker(system, *p, device))) for p in pairs}, {}
        for side, setting in pairs:
            try:
                found[side, setting].clock()
            except RuntimeError as error:
                if side != COMPILED:
                    raise
                skipped[side] = str(error)[:200]
                del found[side, setting]
        yield found, skipped


def figures(system: str, device: str, quick: bool = False) -> list[dict[str, Any]]:
    """One figure for each setting of both sides, and one of plain eager against everything that helps.

    quick: fewer turns, and nothing but both sides as PyTorch comes.
    """
    with workers(sides(system, quick), system, device) as (running, skipped):
        load = ForeignLoad()  # of the clock alone: processes that are still running are no children yet
        times: dict[tuple[str, str], list[float]] = {pair: [] for pair in running}
        own = 0.0
        for _ in range(2 if quick else TURNS):
            for pair, worker in running.items():
                seconds, used = worker.clock()
                times[pair].append(seconds)
                own += used
        others = load.cores(own)
    median = {pair: statistics.median(values) for pair, values in times.items()}
    chosen, found = SYSTEMS[system], []
    case = f"{system}-{chosen.batch}x{'x'.join(map(str, chosen.shape))}"
    head = {"op": "training step", "dtype": chosen.config.precision, "device": device, "foreign_load": others}
    mixed = "eager stock, fused tuned"
    compared = ((STOCK, STOCK, STOCK), (TUNED, TUNED, TUNED), (mixed, STOCK, TUNED))
    for name, theirs, ours in compared[: 1 if quick else None]:
        taken = {side: t for (side, setting), t in median.items() if setting == theirs and side != FUSED}
        taken[FUSED] = median[FUSED, ours]
        left_out = {side: {"skipped": why} for side, why in skipped.items() if theirs == STOCK}
        turns = {side: [a / b for a, b in zip(times[side, theirs], times[FUSED, ours], strict=True)] for side in taken}
        spread = {side: (round(min(t), 3), round(max(t), 3)) for side, t in turns.items() if side != FUSED}
        more = {"setting": name, "ratio": ratios(taken), "spread": spread}
        found.append({**head, "case": f"{case}, {name}", "variants": walls(taken) | left_out, **more})
    return found


def served(system: str) -> bool:
    """Whether this processor has the system's precision: PyTorch emulates it, far slower than float32, if not."""
    precision = SYSTEMS[system].config.precision
    return DEVICE != "cpu" or precision == "float32" or onednn.serves(PRECISIONS[precision])


_QUICK = ("mlp_vae", "mlp_gan", "srresnet_64", "vrnn")  # whose steps are short


@pytest.mark.parametrize(
    "system", [pytest.param(name, marks=[pytest.mark.quick] * (name in _QUICK)) for name in SYSTEMS if served(name)]
)
@pytest.mark.benchmark(group="training step", max_time=0.5, min_rounds=3)
def test_training_step(benchmark, measured, quick, system):
    clock = functools.partial(figures, system, DEVICE, quick)
    measured(benchmark, "training", system, lambda: red(SYSTEMS[system], DEVICE), clock)
    benchmark(make_step(system, FUSED, DEVICE))


def main() -> None:
    """What a `Worker` starts: says when it is ready, then clocks the step for each line that it reads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("side")
    parser.add_argument("setting", choices=(STOCK, TUNED))
    parser.add_argument("device")
    options = parser.parse_args()
    sys.stdin.readline()  # others may be starting: what warms up measures
    if options.setting == TUNED:
        genai_fast.tune_cpu()
    step = make_step(options.system, options.side, options.device)
    compare({"step": step}, rounds=2, seconds=SECONDS)
    print(json.dumps({"seconds": 0.0, "used": 0.0}), flush=True)
    for _ in sys.stdin:
        before = time.process_time()
        seconds = compare({"step": step}, rounds=ROUNDS, seconds=SECONDS, warm_up=1).timings["step"].median
        print(json.dumps({"seconds": seconds, "used": time.process_time() - before}), flush=True)


if __name__ == "__main__":
    main()
