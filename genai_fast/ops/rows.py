"""Which rows of a batch this process has where several share one: each draws the noise of its own rows."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from genai_fast.kernels.common.recorder import reads
from genai_fast.scoped import Scoped


@dataclass(frozen=True)
class Rows:
    """Rows before .. before + count - 1 of a batch of `total`; idle: another process has them too, and counts them."""

    before: int
    count: int
    total: int
    idle: bool = False


_mine: Scoped[Rows | None] = Scoped("genai_fast.ops.rows", None)  # None: all of them


def mine() -> Rows | None:
    """What this process has at present; None: all rows."""
    return _mine.get()


@contextlib.contextmanager
def having(rows: Rows) -> Iterator[None]:
    """Inside, what is drawn without a seed is drawn for these rows alone.

    It takes default generators that are in the same state in all processes; their states stay alike, and like that of
    one process that has all rows. Every op numbers the elements of its own tensor, so where the batch comes first the
    noise is that of the joined batch; elsewhere (steps first, or two batches in one) no two processes draw the same.
    """
    block = _mine.enter(rows)
    block.open = True
    try:
        yield
    finally:
        _mine.leave(block)


def offset(elements: int) -> int:
    """The number of elements that other processes have before this one's, of whose tensor it has `elements`."""
    rows = reads(mine)
    return 0 if rows is None else rows.before * (elements // rows.count)


def drawn(draw: Callable[[int], torch.Tensor], count: int) -> torch.Tensor:
    """This process's `count` rows, a batch's or an equal part's, of draw(rows of all processes), rows first."""
    rows = mine()
    if rows is None:
        return draw(count)
    before, total = (number * count // rows.count for number in (rows.before, rows.total))
    return draw(total)[before : before + count]
