"""Whole training steps against the plain PyTorch scripts that people write, as `bench.systems` lists them.

Each side runs in a process of its own, in turn (A B A B ...): settings of the allocator belong to a process,
and so do its habits. Every side is measured with the stock allocator and with one that keeps its memory, so
that nobody takes an allocator for a kernel. No side changes the library of matrix products.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import record
from bench.points import DEVICE, FUSED
from genai_fast.profiling import ForeignLoad, compare
from genai_fast.profiling.systems import SYSTEMS

TURNS = 2
ROUNDS, SECONDS = 4, 1.0  # of clocking in each process, at least
EAGER = "eager"
ALLOCATORS = ("stock allocator", "memory kept")


def keep_memory() -> None:
    """Tell glibc to hand no freed memory back to the system, which clears it before it gives it out again."""
    libc = ctypes.CDLL(None)
    for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        if not libc.mallopt(option, 1 << 30):
            raise RuntimeError(f"mallopt({option}, 1 << 30) was refused")


def make_step(system: str, side: str, device: str) -> Callable[[], Any]:
    """One step on a batch that stays the same, as one call."""
    torch.manual_seed(0)
    chosen = SYSTEMS[system]
    batch = chosen.inputs(device)
    step = chosen.fused(device) if side == FUSED else chosen.plain(device)
    return lambda: step(*batch)


def red(system: str, device: str) -> str:
    """Why the two steps do not compute the same; "" if they do (noise and dropout differ, by little)."""
    chosen = SYSTEMS[system]
    batch = chosen.inputs(device)
    losses = []
    for make in (chosen.plain, chosen.fused):
        torch.manual_seed(0)
        found = make(device)(*batch)
        losses.append(torch.stack([loss.float() for loss in (found if isinstance(found, tuple) else (found,))]))
    plain, fused = losses[0] / chosen.plain_scale, losses[1][: len(losses[0])]
    wrong = (plain - fused).abs() > chosen.tolerance * plain.abs()
    return f"losses: expected about {plain.tolist()}, got {fused.tolist()}" if wrong.any() else ""


def in_a_process(system: str, side: str, allocator: str, device: str) -> float:
    """Median seconds a step."""
    command = [sys.executable, "-m", "bench.bench_training", system, side, allocator, device]
    done = subprocess.run(command, cwd=record.ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


@functools.cache
def figures(system: str, device: str) -> tuple[dict[str, Any], ...]:
    """One figure for each allocator on both sides, and one of plain eager against everything that helps."""
    load = ForeignLoad()
    pairs = [(side, allocator) for allocator in ALLOCATORS for side in (EAGER, FUSED)]
    times: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for _ in range(TURNS):
        for pair in pairs:
            times[pair].append(in_a_process(system, *pair, device))
    seconds = {pair: statistics.median(values) for pair, values in times.items()}
    stock, kept = ALLOCATORS
    compared = {f"{a}": (a, a) for a in ALLOCATORS} | {"eager stock, fused kept": (stock, kept)}
    chosen, found = SYSTEMS[system], []
    for name, (theirs, ours) in compared.items():
        variants = {EAGER: seconds[EAGER, theirs], FUSED: seconds[FUSED, ours]}
        found.append(
            {
                "op": "training step",
                "case": f"{system}-{chosen.batch}x{'x'.join(map(str, chosen.shape))}, {name}",
                "dtype": chosen.config.precision,
                "device": device,
                "variants": {side: {"wall_us": round(t * 1e6, 2)} for side, t in variants.items()},
                "ratio": {EAGER: round(variants[EAGER] / variants[FUSED], 3)},
                "foreign_load": load.cores(),
            }
        )
    return tuple(found)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.benchmark(group="training step", max_time=0.5, min_rounds=3)
def test_training_step(benchmark, figures_of_session, system):
    assert not red(system, DEVICE), "no clock on a red gate"
    if not benchmark.disabled:
        found = figures(system, DEVICE)
        figures_of_session.extend(copy.deepcopy(found))
        benchmark.extra_info.update(found[0], allocators=[f["ratio"] for f in found])
    benchmark(make_step(system, FUSED, DEVICE))


def main() -> None:
    """What `in_a_process` starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("side", choices=(EAGER, FUSED))
    parser.add_argument("allocator", choices=ALLOCATORS)
    parser.add_argument("device")
    options = parser.parse_args()
    if options.allocator == ALLOCATORS[1]:
        keep_memory()
    step = make_step(options.system, options.side, options.device)
    print(json.dumps({"seconds": compare({"step": step}, rounds=ROUNDS, seconds=SECONDS).timings["step"].median}))


if __name__ == "__main__":
    main()
