"""The stages "figures" and "compiled": figures of each op's points, without and with torch.compile.

Numerics of the very case come first: a wrong one has no figures.
"""

import functools
from typing import Any

from bench.points import FUSED, Point, figures, points, red
from genai_fast.kernels.common import tuned


def launches(point: Point) -> list[str]:
    """Names of the fused step's launches whose settings can be tuned."""
    step = point.step(FUSED)
    with tuned.asked() as found:
        step()
    return sorted({launch.name for launch in found})


def measure(point: Point, compiled: bool) -> dict[str, Any]:
    """Figures of a point and its launches, or why there are none."""
    if message := red(point):
        return {"failures": {"numerics": message}}
    return {**figures(point, compiled=compiled), "launches": launches(point)}


@functools.cache
def _known(device: str) -> dict[str, Point]:
    return {str(point): point for point in points(device)}


def work(name: str, device: str, compiled: bool = False) -> dict[str, Any]:
    return measure(_known(device)[name], compiled)
