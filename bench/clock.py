"""Device time on CUDA: graph replay, the L2 cache flushed, inputs in rotation."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from genai_fast.training.graph import _mend_generator, _waiting_raises

Call = Callable[[], Any]
Around = tuple[torch.cuda.Event, torch.cuda.Event]


def capture(call: Call, around: Around | None = None) -> tuple[Callable[[], None], Any]:
    """Record `call` as a CUDA graph, after a warm-up; gives its replay and the outputs that it writes to.

    A call that cannot be captured raises, and leaves nothing behind.

    Args:
        around: events that the graph itself records, before and behind the call.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with _capturing(graph):
        if around is not None:
            around[0].record()
        outputs = call()
        if around is not None:
            around[1].record()
    return graph.replay, outputs


@contextlib.contextmanager
def _capturing(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    device = torch.device("cuda", torch.cuda.current_device())
    current, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    try:
        # Relaxed: an op that may not ask the device for a size takes another tile in a capture than it took before, so
        # a kernel may be loaded here for the first time. The stricter modes forbid that; it is no work of the stream's.
        with torch.cuda.graph(graph, pool, capture_error_mode="relaxed"), _waiting_raises():
            yield
    except BaseException:
        torch.cuda.set_stream(current)  # where ending a broken capture raises, torch leaves its own
        graph.reset()
        _mend_allocator(device, pool)
        _mend_generator(device)
        raise


def _mend_allocator(device: torch.device, pool: Any) -> None:
    """A capture whose end raised goes on for the allocator, which then gives no memory back; end it there too."""
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:  # it has ended: graph.reset() has done the rest
        return
    torch._C._cuda_releasePool(device.index, pool)


def device_times(
    calls: dict[str, Sequence[Call]], rounds: int = 50, uncaptured: Collection[str] = ()
) -> dict[str, tuple[float, str]]:
    """Median device time of each call in seconds, interleaved, and how it was had: "graph" or "events".

    Events stand around the replay of a captured graph, or around the call itself where it cannot be captured
    (then launch overhead counts if it is the longer). Where a call draws random numbers they stand inside the graphs,
    of all alike: a replay first fills in the generator's state, by kernels that are none of the call's. The L2 cache is
    flushed before each.

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
        except Exception:  # whatever the capture of somebody's code raises
            torch.cuda.synchronize()
    flush = _larger_than_the_cache()
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
            flush.zero_()
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


def _larger_than_the_cache() -> torch.Tensor:
    size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(size, dtype=torch.int8, device="cuda")


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
