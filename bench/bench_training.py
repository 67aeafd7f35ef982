"""The training step of the MLP VAE (784-400-20, batch 128) against the same model in plain PyTorch.

Each side runs in a process of its own, in turn (A B A B ...): settings of the allocator belong to a process,
and so do its habits. Every side is measured with the stock allocator and with one that keeps its memory, so
that nobody takes an allocator for a kernel.
"""

from __future__ import annotations

import argparse
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
from genai_fast.models import MLPVAE
from genai_fast.models.peers import EagerMLPVAE
from genai_fast.profiling import ForeignLoad, compare
from genai_fast.training.config import VAEConfig
from genai_fast.training.step import Step, make_optimizer

BATCH = 128
TURNS = 3
SECONDS = 1.0  # of clocking in each process
EAGER, EAGER_FUSED_ADAM = "eager", "eager (fused Adam)"
SIDES = (EAGER, EAGER_FUSED_ADAM, FUSED)
ALLOCATORS = ("stock allocator", "memory kept")


def keep_memory() -> None:
    """Tell glibc to hand no freed memory back to the system, which clears it before it gives it out again."""
    libc = ctypes.CDLL(None)
    for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        if not libc.mallopt(option, 1 << 30):
            raise RuntimeError(f"mallopt({option}, 1 << 30) was refused")


def make_step(side: str, device: str) -> Callable[[], Any]:
    """One optimizer step on a batch that stays the same, as one call."""
    torch.manual_seed(0)
    x = torch.rand(BATCH, 784, device=device)
    if side == FUSED:
        model = MLPVAE().to(device)
        step = Step(model, make_optimizer(model, VAEConfig()))
        return lambda: step(x)
    model = EagerMLPVAE().to(device)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True if side == EAGER_FUSED_ADAM else None)

    def plain() -> torch.Tensor:
        adam.zero_grad()
        loss = model.loss(x)
        loss.backward()
        adam.step()
        return loss

    return plain


def red(device: str) -> str:
    """Why the two models do not compute the same; "" if they do (their noise differs, by little)."""
    torch.manual_seed(0)
    x = torch.rand(BATCH, 784, device=device)
    eager, fused = EagerMLPVAE().to(device), MLPVAE().to(device)
    fused.load_state_dict(eager.state_dict())
    with torch.no_grad():
        expected, got = float(eager.loss(x)) / BATCH, float(fused.training_step(x).loss)
    return "" if abs(got - expected) <= 5e-3 * expected else f"loss: expected about {expected:g}, got {got:g}"


def in_a_process(side: str, allocator: str, device: str) -> float:
    """Median seconds a step."""
    command = [sys.executable, "-m", "bench.bench_training", side, allocator, device]
    done = subprocess.run(command, cwd=record.ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


@functools.cache
def figures(device: str) -> tuple[dict[str, Any], ...]:
    """One figure for each allocator on both sides, and one of plain eager against everything that helps."""
    load = ForeignLoad()
    pairs = [(side, allocator) for allocator in ALLOCATORS for side in SIDES]
    times: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for _ in range(TURNS):
        for pair in pairs:
            times[pair].append(in_a_process(*pair, device))
    seconds = {pair: statistics.median(values) for pair, values in times.items()}
    stock, kept = ALLOCATORS
    compared = {f"{a}": (a, a) for a in ALLOCATORS} | {"eager stock, fused kept": (stock, kept)}
    found = []
    for name, (theirs, ours) in compared.items():
        variants = {side: seconds[side, ours if side == FUSED else theirs] for side in SIDES}
        found.append(
            {
                "op": "training step",
                "case": f"mlp_vae-{BATCH}x784, {name}",
                "dtype": "float32",
                "device": device,
                "variants": {side: {"wall_us": round(t * 1e6, 2)} for side, t in variants.items()},
                "ratio": {side: round(t / variants[FUSED], 3) for side, t in variants.items() if side != FUSED},
                "foreign_load": load.cores(),
            }
        )
    return tuple(found)


@pytest.mark.parametrize("comparison", range(3), ids=("stock", "kept", "stock_to_kept"))
@pytest.mark.benchmark(group="training step", max_time=0.5)
def test_training_step(benchmark, figures_of_session, comparison):
    assert not red(DEVICE), "no clock on a red gate"
    if not benchmark.disabled:
        found = figures(DEVICE)[comparison]
        figures_of_session.append(found)
        benchmark.extra_info.update(found)
    benchmark(make_step(FUSED, DEVICE))


def main() -> None:
    """What `in_a_process` starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("allocator", choices=ALLOCATORS)
    parser.add_argument("device")
    options = parser.parse_args()
    if options.allocator == ALLOCATORS[1]:
        keep_memory()
    step = make_step(options.side, options.device)
    print(json.dumps({"seconds": compare({"step": step}, seconds=SECONDS).timings["step"].median}))


if __name__ == "__main__":
    main()
