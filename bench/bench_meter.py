"""What the training loop's own measuring costs: each step with the meter and without, and the meter alone.

The difference of two whole steps drowns in the machine's noise where the meter takes a hundredth of one; `share`, of
the meter alone over the step without it, does not. On CUDA that is host time, which the device does not wait for.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.points import DEVICE
from genai_fast.profiling import compare
from genai_fast.profiling.systems import SYSTEMS
from genai_fast.training.meter import Meter, Metrics, Progress

ROUNDS, SECONDS, WARM_UP = 11, 2.0, 5
LOG_EVERY = 20  # steps, the loop's default


def metered(run: Callable[[], Any], samples: int, metrics: Metrics) -> Callable[[], None]:
    """What `training.fit` does around a step that returns its losses."""
    meter, number = Meter(Progress(), 0), itertools.count(1)

    def batches() -> Iterator[None]:
        while True:
            yield None

    fed = meter.waiting(batches())

    def call() -> None:
        next(fed)
        meter.add(run(), samples)
        step = next(number)
        if step % LOG_EVERY == 0:
            metrics.write(step=step, samples_per_second=meter.rate(), data_wait=meter.wait(), **meter.latest())

    return call


@pytest.mark.parametrize("system", ["mlp_vae", "mlp_gan"])
@pytest.mark.benchmark(group="meter", max_time=0.5, min_rounds=3)
def test_meter(benchmark, system, tmp_path: Path):
    torch.manual_seed(0)
    chosen = SYSTEMS[system]
    batch, step = chosen.inputs(DEVICE), chosen.fused(DEVICE)
    losses = step(*batch)
    with Metrics(tmp_path / "metrics.jsonl", 0) as metrics:
        calls = {
            "step": lambda: step(*batch),
            "metered step": metered(lambda: step(*batch), chosen.batch, metrics),
            "meter": metered(lambda: losses, chosen.batch, metrics),
        }
        if not benchmark.disabled:
            found = compare(calls, rounds=ROUNDS, seconds=SECONDS, warm_up=WARM_UP)
            seconds = {name: t.median for name, t in found.timings.items()}
            benchmark.extra_info.update(
                system=system,
                share=round(seconds["meter"] / seconds["step"], 5),
                ratio=round(seconds["metered step"] / seconds["step"], 4),
                seconds=seconds,
                foreign_load=found.load.others,
            )
        benchmark(calls["meter"])
