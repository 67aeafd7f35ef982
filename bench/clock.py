"""Clocks: interleaved medians of wall time, device time on CUDA, and what else the machine was doing."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

BLOCK = 1e-3  # seconds; shorter calls are timed several at once, so that their caches are as warm as in a loop
ROUNDS = 11  # at least


def interleaved(calls: dict[str, Callable[[], Any]], seconds: float, device: str = "cpu") -> dict[str, float]:
    """Median wall time of each call, in seconds: all take turns, so that the machine's moods meet all alike.

    Args:
        calls: what to time.
        seconds: how long the whole may take; every call is timed `ROUNDS` times at least.
        device: "cuda" waits for the device at each block's end.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def block(call: Callable[[], Any], count: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return (time.perf_counter() - start) / count

    counts = {}
    for name, call in calls.items():
        block(call, 3)  # first calls allocate, compile, and load libraries
        counts[name] = max(1, round(BLOCK / max(min(block(call, 1) for _ in range(3)), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        if turn >= ROUNDS and time.perf_counter() > end:
            break
        order = list(calls) if turn % 2 == 0 else list(reversed(calls))
        for name in order:
            times[name].append(block(calls[name], counts[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def capture(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record `call` as a CUDA graph, after a warm-up; gives its replay and the outputs that it writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs


def device_times(calls: dict[str, Sequence[Callable[[], Any]]], rounds: int = 50) -> dict[str, tuple[float, str]]:
    """Median device time of each call in seconds, interleaved, and how it was had: "graph" or "events".

    Events stand around the replay of a captured graph, or around the call itself where it cannot be captured
    (then launch overhead counts if it is the longer). The L2 cache is flushed before each.

    Args:
        calls: for each name the same call over several sets of inputs, used in rotation.
    """
    how, ready = {}, {}
    for name, sets in calls.items():
        try:
            ready[name], how[name] = [capture(call)[0] for call in sets], "graph"
        except Exception:  # whatever the capture of somebody's code raises
            torch.cuda.synchronize()
            ready[name], how[name] = list(sets), "events"
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, sets in ready.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            sets[turn % len(sets)]()
            end.record()
            pairs[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: (statistics.median(start.elapsed_time(end) for start, end in events) / 1e3, how[name])
        for name, events in pairs.items()
    }


class Load:
    """Processors that other programs kept busy on average, from construction to `foreign()` (Linux only)."""

    def __init__(self) -> None:
        self._before = self._read()

    def foreign(self) -> float | None:
        after = self._read()
        if self._before is None or after is None:
            return None
        (wall, busy, own), (wall_then, busy_then, own_then) = after, self._before
        return round(max(0.0, (busy - busy_then) - (own - own_then)) / max(wall - wall_then, 1e-9), 2)

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds: of the clock, of all processors' work, of this process and its finished children."""
        try:
            user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
        except (OSError, ValueError):
            return None
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.perf_counter(), busy, own.user + own.system + own.children_user + own.children_system
