"""Time that a training loop spends waiting for its next batch."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, TypeVar

from torch.utils.data import dataloader

T = TypeVar("T")


class Waiting:
    """A stopwatch: seconds waited and batches waited for, by the thread that made it."""

    def __init__(self) -> None:
        self.seconds, self.batches = 0.0, 0
        self._depth, self._thread = 0, threading.get_ident()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        if self._depth or threading.get_ident() != self._thread:  # a loader inside a loader; one that works ahead
            yield
            return
        start, self._depth = time.perf_counter(), 1
        try:
            yield
        finally:
            self._depth = 0
            self.seconds += time.perf_counter() - start
            self.batches += 1

    def timed(self, items: Iterator[T]) -> Iterator[T]:
        """The items, timing how long each takes to arrive."""
        while True:
            with self._running():
                item = next(items, _END)
            if item is _END:
                return
            yield item

    @contextlib.contextmanager
    def on_loaders(self) -> Iterator[None]:
        """Watch every PyTorch DataLoader inside the block."""
        kind, watch = dataloader._BaseDataLoaderIter, self._running
        original = kind.__next__

        def watched(self: Any) -> Any:
            with watch():
                return original(self)

        kind.__next__ = watched
        try:
            yield
        finally:
            kind.__next__ = original


_END: Any = object()
