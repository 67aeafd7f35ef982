"""Recording CUDA work as a graph, so that a recording which fails leaves the process as it was."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of warm-ups and captures: one only, as each stream keeps memory of its own."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Run on another stream, in order with this one: capture asks for a warm-up off the default stream."""
    current, side = torch.cuda.current_stream(device), side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def capture(body: Callable[[], Any], device: torch.device, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Record body() as a CUDA graph of that device: (graph, what body gave).

    Args:
        pool: of `torch.cuda.graph_pool_handle`. Graphs of one pool share memory: only one runs at a time, and none
            reads what another has left.

    Raises: what body raises, also if it waits for the device; the generator, the current stream and the graph's memory
        are as before then.
    """
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        try:
            # Relaxed: kernels that a warm-up did not meet are loaded and memory is pinned then, by this thread and
            # others, which stricter modes forbid. None of it is work of the stream's.
            recording = torch.cuda.graph(graph, pool, side_stream(device), capture_error_mode="relaxed")
            with recording, _waiting_raises():
                result = body()
        except BaseException:
            torch.cuda.set_stream(current)  # where ending a broken capture raises, torch leaves its own
            graph.reset()
            _repair_allocator(device, pool)
            _repair_generator(device)
            raise
    return graph, result


@contextlib.contextmanager
def _waiting_raises() -> Iterator[None]:
    """What waits for the device raises before it does, which would break the capture beyond repair."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _repair_allocator(device: torch.device, pool: Any) -> None:
    """A capture whose end raised continues for the allocator, which then gives no memory back; end it there too."""
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:  # it has ended: graph.reset() has done the rest
        return
    torch._C._cuda_releasePool(device.index, pool)


def _repair_generator(device: torch.device) -> None:
    """Before torch 2.13 a broken capture leaves the generator waiting for its end; then the same state, afresh."""
    generator = torch.cuda.default_generators[device.index]
    try:
        torch.rand((), device=device)
    except RuntimeError:
        generator.graphsafe_set_state(generator.clone_state())
