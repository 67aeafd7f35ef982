"""Which rows of a batch this process has where several share one: each draws the noise of its own rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """Rows before .. before + count - 1 of a batch of `total`; idle: another process has them too, and counts them."""

    before: int
    count: int
    total: int
    idle: bool = False


_mine: Rows | None = None  # None: all of them


def mine() -> Rows | None:
    """What this process has at present; None: all rows."""
    return _mine


@contextlib.contextmanager
def having(rows: Rows) -> Iterator[None]:
    """Inside, what is drawn without a seed is drawn for these rows alone, in this whole process.

    It takes default generators that are in the same state in all processes; their states stay alike, and like that of
    one process that has all rows. Every op numbers the elements of its own tensor, so where the batch comes first the
    noise is that of the joined batch; elsewhere (steps first, or two batches in one) no two processes draw the same.
    """
    global _mine
    before, _mine = _mine, rows
    try:
        yield
    finally:
        _mine = before


def offset(elements: int) -> int:
    """Elements that other processes have before this one's, of a tensor of which this one has so many."""
    return 0 if _mine is None else _mine.before * (elements // _mine.count)


def drawn(draw: Callable[[int], torch.Tensor], count: int) -> torch.Tensor:
    """This process's `count` rows, a batch's or an equal part's, of draw(rows of all processes), rows first."""
    if _mine is None:
        return draw(count)
    before, total = (number * count // _mine.count for number in (_mine.before, _mine.total))
    return draw(total)[before : before + count]
