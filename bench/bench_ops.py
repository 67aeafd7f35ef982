"""Every op against eager PyTorch and torch.compile: `pytest bench/ --benchmark-only`.

Ratios are of interleaved medians: between one benchmark and the next the machine changes more than the code does. What
pytest-benchmark clocks is the fused op alone.
"""

import functools

import pytest
import torch

from bench.points import DEVICE, FUSED, QUICK, figures, points, red

POINTS = tuple(points(DEVICE))
_LIGHT = ("64x64x32x32-3", "4096x384-65", "timegan", "gpt-1x6x1024x64")  # where the first case of an op takes long
_ONE = {p.op.name: p for p in sorted(reversed(POINTS), key=lambda p: any(x in p.case.name for x in _LIGHT))}.values()


@pytest.mark.parametrize("point", [pytest.param(p, id=str(p), marks=[pytest.mark.quick] * (p in _ONE)) for p in POINTS])
@pytest.mark.benchmark(max_time=0.5)
def test_op(benchmark, measured, quick, point):
    torch.manual_seed(0)
    clock = functools.partial(figures, point, **(QUICK if quick else {}))
    measured(benchmark, "figures", str(point), lambda: red(point), lambda: [clock()])
    step = point.step(FUSED)
    benchmark(step if DEVICE == "cpu" else lambda: (step(), torch.cuda.synchronize()))
