"""Device time on CUDA: graph replay, the L2 cache flushed, inputs in rotation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch


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
