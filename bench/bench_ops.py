"""Every op against eager PyTorch and torch.compile: `pytest bench/ --benchmark-only`.

pytest-benchmark clocks one variant after the other; the ratio stored with them is of interleaved medians,
since between one benchmark and the next the machine changes more than the code does.
"""

import functools

import pytest
import torch

from bench.points import COMPILED, DEVICE, Point, figures, points, red

POINTS = tuple(points(DEVICE))
red_once = functools.cache(red)


@functools.cache
def figures_once(point: Point) -> dict:
    return figures(point)


@pytest.mark.parametrize(
    ("point", "variant"), [pytest.param(point, v, id=f"{point}-{v}") for point in POINTS for v in point.variants]
)
@pytest.mark.benchmark(max_time=0.5)
def test_op(benchmark, figures_of_session, point, variant):
    assert not red_once(point), "no clock on a red gate"
    torch.manual_seed(0)
    benchmark.group = f"{point.op} {point.case} {point.precision}"
    step = prepared(point, variant)
    if benchmark.disabled:
        benchmark(step)
        return
    found = figures_once(point)
    if found not in figures_of_session:
        figures_of_session.append(found)
    benchmark.extra_info.update(found, variant=variant)
    benchmark(step if DEVICE == "cpu" else lambda: (step(), torch.cuda.synchronize()))


def prepared(point, variant):
    step = point.step(variant)
    if variant == COMPILED or variant in point.op.gpu_peers:
        try:
            step()
        except Exception as error:  # whatever the compiler raises; a peer's kernel may not serve the case
            pytest.skip(f"{variant}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return step
