"""The figures of ops, a point each.

    python -m bench.op_figures DEVICE [--compile] < a JSON list of points

Numerics of the very case come first: {"refused": why} where they are wrong. `bench.gpu_gate` starts it, as
bench.isolated tells: a point whose launch hangs, or breaks the device's context, takes no other's figures along.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from bench import isolated
from bench.points import FUSED, Point, figures, points, red
from genai_fast.kernels.common import tuned


def launches(point: Point) -> list[str]:
    """The launches of the fused step whose settings can be tuned, by name."""
    step = point.step(FUSED)
    with tuned.asked() as found:
        step()
    return sorted({launch.name for launch in found})


def measure(point: Point, compiled: bool) -> dict[str, Any]:
    """Figures of a point and its launches, or why there are none."""
    if message := red(point):
        return {"refused": message}
    return {**figures(point, compiled=compiled), "launches": launches(point)}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("--compile", dest="compiled", action="store_true", help="torch.compile's too: minutes")
    options = parser.parse_args()
    known = {str(point): point for point in points(options.device)}
    return isolated.serve(lambda name: measure(known[name], options.compiled))


if __name__ == "__main__":
    sys.exit(main())
