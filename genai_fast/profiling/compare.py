"""Comparison of callables by interleaved medians in one process."""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_SAMPLE = 1e-3  # seconds that one sample should last at least, so that the clock's own cost does not count
_MOST_CALLS = 1000


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    calls: int  # in one sample
    samples: tuple[float, ...] = ()  # of each round


@dataclass(frozen=True)
class Load:
    """What else the machine did during the comparison."""

    cores: int
    threads: int  # torch's
    average: float  # the system's load average over the last minute, before the first round
    others: float | None  # cores that other processes kept busy during the rounds; None if not known here


@dataclass(frozen=True)
class Comparison:
    timings: dict[str, Timing]
    load: Load

    def speedup(self, name: str, over: str) -> float:
        """How many times faster `name` is than `over`, by medians."""
        return self.timings[over].median / self.timings[name].median

    def spread(self, name: str, over: str) -> tuple[float, float]:
        """Quartiles of the same over the rounds, whose samples share their disturbances."""
        pairs = zip(self.timings[over].samples, self.timings[name].samples, strict=True)
        low, _, high = statistics.quantiles([theirs / own for theirs, own in pairs], n=4, method="inclusive")
        return low, high

    def __str__(self) -> str:
        lines = [
            f"{name}: {1e3 * t.median:.3f} ms (quartiles {1e3 * t.low:.3f} to {1e3 * t.high:.3f})"
            for name, t in self.timings.items()
        ]
        others = "unknown" if self.load.others is None else f"{self.load.others:.1f}"
        lines += [f"{self.load.cores} cores, {self.load.threads} threads, others kept {others} cores busy"]
        return "\n".join(lines)


def compare(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 30,
    seconds: float = 0.0,
    warm_up: int = 3,
    calls: int | None = None,
) -> Comparison:
    """Time each function once a round, in turn (A B B A ...): what disturbs the machine disturbs all alike.

    CUDA is synchronized around each sample where it is in use.

    Args:
        functions: name -> callable without arguments.
        rounds: samples a function, at least.
        seconds: shortest time to measure for.
        warm_up: samples that are thrown away first.
        calls: calls in a sample; None: as many as a millisecond takes.

    Raises ValueError: nothing to compare, or fewer than two rounds.
    """
    if not functions or rounds < 2:
        raise ValueError(
            f"compare: expected functions and rounds >= 2, got {len(functions)} functions, rounds={rounds}"
        )
    count = {}
    for name, function in functions.items():
        for _ in range(max(warm_up, 1)):
            once = _sample(function, 1)
        count[name] = calls or min(_MOST_CALLS, int(_SAMPLE / max(once, 1e-9)) + 1)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    average = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    foreign, start = ForeignLoad(), time.perf_counter()
    for turn in itertools.count():
        if turn >= rounds and time.perf_counter() >= start + seconds:
            break
        for name, function in list(functions.items())[:: -1 if turn % 2 else 1]:
            samples[name].append(_sample(function, count[name]))
    others = foreign.cores()
    timings = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        timings[name] = Timing(median, low, high, count[name], tuple(values))
    return Comparison(timings, Load(os.cpu_count() or 1, torch.get_num_threads(), average, others))


def _sample(function: Callable[[], Any], calls: int) -> float:
    """Seconds a call, over `calls` calls."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronize()
    return (time.perf_counter() - start) / calls


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class ForeignLoad:
    """Cores that other programs kept busy on average, from construction to `cores()` (Linux only)."""

    def __init__(self) -> None:
        self._before = self._read()

    def cores(self, children: float = 0.0) -> float | None:
        """None where /proc/stat does not tell. children: seconds of work by children of this process that still run."""
        after = self._read()
        if self._before is None or after is None:
            return None
        wall, busy, own = (now - then for now, then in zip(after, self._before, strict=True))
        return round(max(0.0, busy - own - children) / max(wall, 1e-9), 2)

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds: of the clock, of all cores' work, of this process and its finished children."""
        try:
            with open("/proc/stat") as stat:
                user, nice, system, _, _, irq, softirq = map(int, stat.readline().split()[1:8])
        except (OSError, ValueError):
            return None
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.perf_counter(), busy, own.user + own.system + own.children_user + own.children_system
