"""Batches made in a thread while the model computes."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")
_PATIENCE = 1.0  # seconds that a closed generator waits for the item that its thread is making


def ahead(items: Iterable[T], depth: int = 2, pin: bool = False) -> Iterator[T]:
    """The items, in order, made by one background thread up to `depth` ahead of the consumer.

    What making an item raises is raised where it would have been yielded. The thread starts with the first `next` and
    ends when the generator is exhausted, closed or collected.

    Args:
        items: an iterable of tensors or tuples of tensors if `pin`, else of anything; closed at the end if it can be.
        depth: items that wait at most, besides the one in the making.
        pin: put CPU tensors into page-locked memory, from where they go to a GPU asynchronously.
    """
    if depth < 1:
        raise ValueError(f"ahead: depth: expected at least 1, got {depth}")
    return _ahead(items, depth, pin)


def _ahead(items: Iterable[T], depth: int, pin: bool) -> Iterator[T]:
    # (whether there is an item, it or the error in its place)
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def work() -> None:
        error = None
        try:
            for item in items:
                ready.put((True, _pinned(item) if pin else item))
                if stopped.is_set():
                    break
            if hasattr(items, "close"):
                items.close()
        except BaseException as raised:
            error = raised
        if not stopped.is_set():  # who has closed makes room once
            ready.put((False, error))

    # A daemon: an interpreter that ends while a generator is open does not wait for it.
    thread = threading.Thread(target=work, name="genai_fast.data.ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stopped.set()
        with contextlib.suppress(queue.Empty):
            while True:
                ready.get_nowait()
        if thread is not threading.current_thread():  # a generator may be collected in any thread
            thread.join(_PATIENCE)


def _pinned(item: T) -> T:
    if isinstance(item, torch.Tensor):
        return item.pin_memory() if item.device.type == "cpu" else item
    return tuple(_pinned(x) for x in item)
