"""Batches of ids: windows and streams of running text, padded sequences, padded pairs.

Every feed has `samples` (of an epoch), `steps` (batches of an epoch), `epoch(epoch, start)` (its batches from number
`start` on, all of one size, in an order that is a function of (seed, epoch) alone) and `all()` (everything once, in
order, for validation: the last batches may be smaller, and text that is too little for an epoch is enough). A batch is
a tuple of CPU tensors whose first dimension counts samples; ids are int64. What pads an input is the end, what pads a
target is -100.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import torch

from genai_fast.data.errors import DataError, DataWarning
from genai_fast.data.images import epoch_order
from genai_fast.data.text.packed import Tokens

Batch = tuple[torch.Tensor, ...]
IGNORED = -100  # a target that does not count, as in torch.nn.functional.cross_entropy
_MULTIPLE = 16  # to which padded lengths are rounded up, so that there are few shapes
_POOL = 32  # batches whose samples are sorted by length together


class Feed(ABC):
    """What all feeds share. names: of a batch's tensors; size: samples a batch.

    rows: size -> [B] int64, which of a batch's samples `epoch` gives; None: all.
    """

    names: ClassVar[tuple[str, ...]]
    size: int
    rows: Callable[[int], torch.Tensor] | None = None

    @property
    @abstractmethod
    def steps(self) -> int:
        """Batches of an epoch. Raises DataError: there is too little text for one batch."""

    @property
    def samples(self) -> int:
        """Samples of an epoch, the same in each."""
        return self.steps * self.size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """An epoch's batches from number `start` on.

        Raises DataError: there is too little text for one batch; at the call.
        """
        batches = self._epoch(epoch, start, self.steps)
        if self.rows is None:
            return batches
        rows = self.rows(self.size)
        return (tuple(x[rows] for x in batch) for batch in batches)

    @abstractmethod
    def _epoch(self, epoch: int, start: int, steps: int) -> Iterator[Batch]: ...

    @abstractmethod
    def all(self) -> Iterator[Batch]:
        """Everything once, in order."""


def _positive(feed: Feed, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise DataError(f"{type(feed).__name__}: {name}: expected at least 1, got {value}")


class _Running(Feed):
    """Feeds of running text."""

    def __init__(self, tokens: Tokens, block: int, size: int) -> None:
        _positive(self, block=block, size=size)
        self.block, self.size = block, size
        self._ids, self._end = tokens.ids, tokens.end
        if len(tokens) < 2:
            raise DataError(f"{type(self).__name__}: expected at least 2 tokens, got {len(tokens)}; remedy: more text")

    def _check(self, steps: int, needed: int) -> int:
        if steps < 1:
            raise DataError(
                f"{type(self).__name__}: expected at least {needed} tokens for a batch of {self.size} x {self.block},"
                f" got {len(self._ids)}; remedy: more text, or a smaller --batch-size or --block"
            )
        return steps

    def _gather(self, starts: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, y), [B, length] each, from these places on."""
        found = torch.from_numpy(self._ids[starts[:, None] + np.arange(length + 1)].astype(np.int64))
        return found[:, :-1].contiguous(), found[:, 1:].contiguous()


class Windows(_Running):
    """(x [B, T], y [B, T]): y is x one token later. Windows do not overlap; documents follow one another in them.

    An epoch takes them from a random place below `block` on, in random order; the few that fill no batch are others in
    each. all() ends with a batch [1, t] of what fills no window, so weight its means by y.numel().

    Args:
        tokens: the text.
        block: T.
        size: B.
        seed: decides places and orders.
    """

    names = ("ids", "targets")

    def __init__(self, tokens: Tokens, block: int, size: int, seed: int = 0) -> None:
        super().__init__(tokens, block, size)
        self._seed = seed
        self._windows = (len(tokens) - block) // block  # that fit wherever the first one begins

    @property
    def steps(self) -> int:
        return self._check(self._windows // self.size, (self.size + 1) * self.block)

    def _epoch(self, epoch: int, start: int, steps: int) -> Iterator[Batch]:
        # One number more than the order's key, and not a zero, which would leave the key the same.
        first = int(np.random.default_rng((self._seed, epoch + 1, 1)).integers(self.block))
        starts = first + self.block * epoch_order(self._windows, self._seed, epoch).numpy()
        for number in range(start, steps):
            yield self._gather(starts[number * self.size : (number + 1) * self.size], self.block)

    def all(self) -> Iterator[Batch]:
        windows, rest = divmod(len(self._ids) - 1, self.block)
        for first in range(0, windows, self.size):
            yield self._gather(self.block * np.arange(first, min(first + self.size, windows)), self.block)
        if rest:
            yield self._gather(np.array([self.block * windows]), rest)


class Streams(_Running):
    """(x [B, T], y [B, T], carry [B] float32): B places in the text that move on together, block by block.

    Row b of a batch continues where row b of the batch before it ended, so a hidden state is kept where `carry` is 1
    and starts again where it is 0: in the first batch. Epochs are all alike. In all() the streams are a little longer
    and the last one is padded, so that each token is a target once; weight its means by (y >= 0).sum().

    Args:
        tokens: the text.
        block: T.
        size: B.
    """

    names = ("ids", "targets", "carry")

    @property
    def steps(self) -> int:
        return self._check((len(self._ids) - 1) // self.size // self.block, self.size * self.block + 1)

    def _epoch(self, epoch: int, start: int, steps: int) -> Iterator[Batch]:
        starts = steps * self.block * np.arange(self.size)
        for number in range(start, steps):
            x, y = self._gather(starts + number * self.block, self.block)
            yield x, y, torch.full((self.size,), float(number > 0))

    def all(self) -> Iterator[Batch]:
        targets = len(self._ids) - 1
        streams = max(1, min(self.size, targets // self.block))
        length = -(-targets // streams)
        starts = length * np.arange(streams)
        for first in range(0, length, self.block):
            now = min(self.block, length - first)
            places = starts[:, None] + first + np.arange(now)
            inside = np.minimum(places, targets - 1)
            x, y = (torch.from_numpy(self._ids[inside + k].astype(np.int64)) for k in (0, 1))
            beyond, carry = torch.from_numpy(places >= targets), torch.full((streams,), float(first > 0))
            yield x.masked_fill_(beyond, self._end), y.masked_fill_(beyond, IGNORED), carry


class _Documents:
    """Documents as rows of at most `longest` ids, the last of which is the end."""

    def __init__(self, tokens: Tokens, longest: int) -> None:
        self._ids, self._end, self._longest = tokens.ids, tokens.end, longest
        self._starts = tokens.offsets[:-1]
        whole = np.diff(tokens.offsets)
        self.lengths = np.minimum(whole, longest)
        self.cut = int((whole > longest).sum())

    def rows(self, chosen: np.ndarray) -> Batch:
        """(ids [B, T], lengths [B]) of these documents: T is the longest's length, rounded up."""
        lengths = self.lengths[chosen]
        longest = min(self._longest, -(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE)
        places = np.arange(longest)
        last = lengths[:, None] - 1
        ids = self._ids[self._starts[chosen][:, None] + np.minimum(places, last)].astype(np.int64)
        ids[places >= last] = self._end  # what is cut has its end there too
        return torch.from_numpy(ids), torch.from_numpy(lengths)


class _Padded(Feed):
    """Feeds of documents: samples of like length come together, batches in random order."""

    def __init__(self, columns: tuple[_Documents, ...], longest: int, size: int, seed: int) -> None:
        self.size, self._seed, self._columns = size, seed, columns
        self._count = len(columns[0].lengths)
        self.cut = sum(column.cut for column in columns)
        if self.cut:
            warnings.warn(
                f"{type(self).__name__}: {self.cut} of {self._count * len(columns)} texts have more than {longest}"
                f" tokens and are cut; remedy: a larger longest",
                DataWarning,
                stacklevel=3,
            )

    @property
    def steps(self) -> int:
        if self._count < self.size:
            raise DataError(
                f"{type(self).__name__}: expected at least {self.size} texts for a batch, got {self._count};"
                f" remedy: more text, or a smaller --batch-size"
            )
        return self._count // self.size

    def _epoch(self, epoch: int, start: int, steps: int) -> Iterator[Batch]:
        order = epoch_order(self._count, self._seed, epoch).numpy()[: steps * self.size]
        total = sum(column.lengths for column in self._columns)
        pools = np.split(order, range(_POOL * self.size, len(order), _POOL * self.size))
        alike = np.concatenate([pool[np.argsort(total[pool], kind="stable")] for pool in pools])
        batches = alike.reshape(steps, self.size)
        shuffled = np.random.default_rng((self._seed, epoch + 1, 1)).permutation(steps)
        for number in shuffled[start:]:
            yield self._rows(batches[number])

    def all(self) -> Iterator[Batch]:
        for first in range(0, self._count, self.size):
            yield self._rows(np.arange(first, min(first + self.size, self._count)))

    def _rows(self, chosen: np.ndarray) -> Batch:
        return tuple(part for column in self._columns for part in column.rows(chosen))


class Sequences(_Padded):
    """(ids [B, T], lengths [B]): each document is a sequence that ends with the end, which its length counts.

    T is the batch's longest length rounded up to a multiple of 16, and at most `longest`.

    Args:
        tokens: the documents.
        longest: ids of a sequence at most; longer ones are cut, with a DataWarning; `cut` counts them.
        size: B.
        seed: decides the orders.
    """

    names = ("ids", "lengths")

    def __init__(self, tokens: Tokens, longest: int, size: int, seed: int = 0) -> None:
        _positive(self, longest=longest, size=size)
        super().__init__((_Documents(tokens, longest),), longest, size, seed)


class Pairs(_Padded):
    """(source [B, S], source_lengths [B], target [B, T], target_lengths [B]): two documents each, as in Sequences.

    Args:
        sources, targets: the documents (see pack_pairs); the first belongs to the first, and so on.
        longest, size, seed: as in Sequences.
    """

    names = ("source", "source_lengths", "target", "target_lengths")

    def __init__(self, sources: Tokens, targets: Tokens, longest: int, size: int, seed: int = 0) -> None:
        _positive(self, longest=longest, size=size)
        if sources.documents != targets.documents:
            raise DataError(
                f"Pairs: expected as many targets as sources, {sources.documents}, got {targets.documents};"
                f" remedy: both sides of the same pairs"
            )
        super().__init__((_Documents(sources, longest), _Documents(targets, longest)), longest, size, seed)
