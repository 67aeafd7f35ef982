"""Microseconds that a call of each op takes of the processor, beside a call as Liger makes them.

    python -m bench.host_path [--json] [OP ...]

On a GPU its own driver is called; without one a libcuda that returns at once (stub.py), so a real launch's 2 us are
missing everywhere alike. All calls take turns and each figure is a median: what counts is the ratio to `liger_like`.
With --json the last line is {"liger_like": us, "layer_norm": us, ...}, forward where autograd records it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from bench.host_path.calls import NAMES, calls, liger_like
from bench.host_path.stub import stub_gpu
from genai_fast import use_backend

WARM, TURN = 6, 0.002  # calls before any counts; seconds a turn
LIGER = "liger_like"
Times = dict[str, float]


def clock(named: dict[str, Callable[[], object]], rounds: int) -> Times:
    """Median microseconds of each call: processor time of this thread, in turns of a few milliseconds."""
    counts: dict[str, int] = {}
    for name, call in named.items():
        for _ in range(WARM):
            call()
        counts[name] = max(int(TURN / max(_seconds(call, 20), 1e-7)), 5)
    taken: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(rounds):
        for name, call in named.items():
            taken[name].append(1e6 * _seconds(call, counts[name]))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return {name: statistics.median(found) for name, found in taken.items()}


def _seconds(call: Callable[[], object], count: int) -> float:
    before = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - before) / count


@contextlib.contextmanager
def machine() -> Iterator[torch.device]:
    """Where the tensors lie."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with stub_gpu(), use_backend("triton"):
        yield torch.device("cpu")


def measure(only: list[str], rounds: int) -> tuple[Times, Times]:
    """(forward without autograd, forward with autograd)"""
    with machine() as device:
        plain = {LIGER: liger_like(device, grad=False)} | calls(device, only, grad=False)
        kept = {LIGER: liger_like(device, grad=True)} | calls(device, only, grad=True)
        with torch.no_grad():
            without = clock(plain, rounds)
        return without, clock(kept, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host_path", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"what to measure of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print the figures with autograd as JSON, as the last line")
    parser.add_argument("--rounds", type=int, default=25, help="turns of each call (default: 25)")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(NAMES):
        parser.error(f"OP: expected some of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    without, kept = measure(arguments.ops, arguments.rounds)
    print(f"{'us a call':34s} {'forward':>9s} {'x liger':>8s} {'+ autograd':>11s} {'x liger':>8s}")
    for name, us in kept.items():
        plain = f"{without[name]:9.1f} {without[name] / without[LIGER]:8.2f}" if name in without else " " * 18
        print(f"{name:34s} {plain} {us:11.1f} {us / kept[LIGER]:8.2f}")
    if arguments.json:
        print(json.dumps({name: round(us, 2) for name, us in kept.items()}))


if __name__ == "__main__":
    main()
