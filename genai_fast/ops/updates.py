"""Whether the forward at hand ends an update of the weights, or is one of several parts that make one."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_ends: ContextVar[bool] = ContextVar("genai_fast.ops.updates", default=True)


@contextlib.contextmanager
def part(last: bool) -> Iterator[None]:
    """Inside, a training step computes one of the parts of an update."""
    token = _ends.set(last)
    try:
        yield
    finally:
        _ends.reset(token)


def ends() -> bool:
    """Whether no other forward of the same update follows: what counts updates counts then."""
    return _ends.get()
