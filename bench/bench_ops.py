"""Every op against eager PyTorch and torch.compile: `pytest bench/ --benchmark-only`.

Ratios are of interleaved medians: between one benchmark and the next the machine changes more than the code does. What
pytest-benchmark clocks is the fused op alone.
"""

import functools

import pytest
import torch

from bench.points import DEVICE, FUSED, figures, points, red

POINTS = tuple(points(DEVICE))
_FIRST = {point.op.name: point for point in reversed(POINTS)}.values()  # of each op


@pytest.mark.parametrize(
    "point", [pytest.param(p, id=str(p), marks=[pytest.mark.quick] * (p in _FIRST)) for p in POINTS]
)
@pytest.mark.benchmark(max_time=0.5)
def test_op(benchmark, measured, quick, point):
    torch.manual_seed(0)
    clock = functools.partial(figures, point, 0.5 if quick else None, compiled=not quick)
    measured(benchmark, "figures", str(point), lambda: red(point), lambda: [clock()])
    step = point.step(FUSED)
    benchmark(step if DEVICE == "cpu" else lambda: (step(), torch.cuda.synchronize()))
