"""Device time on CUDA: graph replay, the L2 cache flushed, inputs in rotation."""

import statistics
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from genai_fast.capture import aside
from genai_fast.capture import capture as record_graph

Call = Callable[[], Any]
Around = tuple[torch.cuda.Event, torch.cuda.Event]


def capture(call: Call, around: Around | None = None) -> tuple[Callable[[], None], Any]:
    """Record `call` as a CUDA graph, after a warm-up; gives its replay and the outputs that it writes to.

    A call that cannot be captured raises, and leaves nothing behind.

    Args:
        around: events that the graph itself records, before and behind the call.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    with aside(device):
        for _ in range(3):
            call()

    def body() -> Any:
        if around is not None:
            around[0].record()
        outputs = call()
        if around is not None:
            around[1].record()
        return outputs

    graph, outputs = record_graph(body, device)
    return graph.replay, outputs


def device_times(
    calls: dict[str, Sequence[Call]], rounds: int = 50, uncaptured: Collection[str] = ()
) -> dict[str, tuple[float, str]]:
    """Median device time of each call in seconds, interleaved, and how it was had: "graph" or "events".

    Events stand around the replay of a captured graph, or around the call itself where it cannot be captured
    (then launch overhead counts if it is the longer). Where a call draws random numbers they stand inside the graphs,
    of all alike: a replay first fills in the generator's state, by kernels that are none of the call's. The L2 cache is
    flushed before each, by reading: what it then holds need not be written back while the call runs.

    Args:
        calls: for each name the same call over several sets of inputs, used in rotation.
        uncaptured: names whose capture is not tried.
    """
    inside = any(_draws(sets[0]) for name, sets in calls.items() if name not in uncaptured)
    how: dict[str, str] = {}
    ready: dict[str, list[tuple[Call, Around | None]]] = {}
    for name, sets in calls.items():
        how[name], ready[name] = "events", [(call, None) for call in sets]
        if name in uncaptured:
            continue
        try:
            captured = []
            for call in sets:
                around = _events_of_a_graph() if inside else None
                captured.append((capture(call, around)[0], around))
            how[name], ready[name] = "graph", captured
        except Exception:  # whatever the capture of foreign code raises
            torch.cuda.synchronize()
    flush = _flush_of_the_cache()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    waiting: list[tuple[str, Around]] = []

    def read() -> None:
        torch.cuda.synchronize()
        for name, (start, end) in waiting:
            taken[name].append(start.elapsed_time(end) / 1e3)
        waiting.clear()

    for turn in range(rounds):
        for name, sets in ready.items():
            call, around = sets[turn % len(sets)]
            start, end = around or _events()
            flush()
            if around is None:
                start.record()
            call()
            if around is None:
                end.record()
            waiting.append((name, (start, end)))
        if inside:
            read()  # before a graph records its events again
    read()
    return {name: (statistics.median(seconds), how[name]) for name, seconds in taken.items()}


def _flush_of_the_cache() -> Call:
    """Reads memory of twice the L2 cache's size."""
    size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    memory, most = torch.zeros(size // 4, device="cuda"), torch.empty((), device="cuda")
    return lambda: torch.amax(memory, dim=0, out=most)


def _draws(call: Call) -> bool:
    """Whether a call draws random numbers on the device."""
    before = torch.cuda.get_rng_state()
    call()
    return not torch.equal(before, torch.cuda.get_rng_state())


def _events(**more: bool) -> Around:
    return torch.cuda.Event(enable_timing=True, **more), torch.cuda.Event(enable_timing=True, **more)


def _events_of_a_graph() -> Around | None:
    """Which its replays record; None where PyTorch has none such."""
    try:
        return _events(external=True)
    except TypeError:
        return None
