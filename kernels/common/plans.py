"""Plans: what a call comes to, recorded once for arguments of a signature and then simply done again.

The Python of a call (checks, the choice of a kernel and its blocks, Triton's binding of arguments) takes several times
as long as eager PyTorch's. What it comes to, memory and kernels, follows from the signature alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from genai_fast.kernels.common.recorder import Plan, Recorder, recording

_MOST_KEPT = 1024  # signatures of one function
_books: list[Book] = []
looked_at = 0  # how many blocks of `unused` are open


class Book:
    """The plans of one function, by the signature of its arguments."""

    def __init__(self) -> None:
        self._plans: dict[Any, Plan | None] = {}  # None: such a call has no plan
        self._seen: set[Any] = set()
        _books.append(self)

    def find(self, key: Any) -> Plan | None:
        """The plan for arguments of that signature, if there is one that holds."""
        plan = self._plans.get(key)
        return plan if plan is None or not plan.reads or plan.holds() else None

    def call(self, key: Any, body: Callable[[], Any], given: dict[str, torch.Tensor]) -> Any:
        """body(), which is recorded when the signature comes for the second time: numbers that change with each call,
        as an offset does, cost nothing so.
        """
        if key in self._seen:
            return self.record(key, body, given)[0]
        if len(self._seen) >= _MOST_KEPT:
            self.forget()
        self._seen.add(key)
        return body()

    def record(self, key: Any, body: Callable[[], Any], given: dict[str, torch.Tensor]) -> tuple[Any, Plan | None]:
        """body() and its plan, which is kept."""
        refused = key in self._plans and self._plans[key] is None
        capturing = any(x.is_cuda for x in given.values()) and torch.cuda.is_current_stream_capturing()
        if refused or capturing:
            return body(), None
        if len(self._plans) >= _MOST_KEPT:
            self.forget()
        with recording(Recorder(given)) as recorder:
            result = body()
        if recorder is None:
            return result, None
        plan = self._plans[key] = recorder.plan(result)
        return result, plan

    def forget(self) -> None:
        self._plans.clear()
        self._seen.clear()


def forget() -> None:
    """Make all plans anew: what launchers take their settings from has changed."""
    for book in _books:
        book.forget()


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """Inside, every call takes the whole way, as somebody looks at it."""
    global looked_at
    looked_at += 1
    try:
        yield
    finally:
        looked_at -= 1
