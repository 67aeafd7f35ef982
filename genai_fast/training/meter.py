"""What a training run measures of itself: losses, rates, waits; and metrics.jsonl, where they are kept."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F

from genai_fast import atomic_files
from genai_fast.training.batches import Feed
from genai_fast.training.tensorboard import Board


@dataclass
class Progress:
    """Where a run stands: the next batch; `sums`: of the epoch's losses times batch sizes, and of those sizes."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0  # spent on this epoch's steps
    waited: float = 0.0  # of those, for data
    skipped: int = 0  # updates in this epoch left out because a loss was not finite
    sums: list[float] = field(default_factory=list)
    ailing: list[str] = field(default_factory=list)  # kinds of the last epoch's warnings
    best: int = 0  # step after which held-out data was best so far; 0: none yet
    lowest: float = 0.0  # what it was then


class Meter:
    """An epoch's clock, and its losses, summed on the device over the samples of steps that were finite."""

    def __init__(self, at: Progress, skipped: int) -> None:
        self._sums = torch.tensor(at.sums, dtype=torch.float64) if at.sums else None
        self._before, self._since = (at.seconds, at.waited), time.perf_counter()
        self._samples, self._waited, self._skipped = 0, 0.0, at.skipped - skipped
        self._last, self._steps = self._since, []  # seconds from the end of a step to that of the next

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, timing how long each takes to arrive."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def add(self, losses: Any, samples: int) -> None:
        self._names, self._latest = losses._fields, torch.stack(tuple(losses)).double()
        counted = F.pad(self._latest, (0, 1), value=1.0) * samples
        counted = torch.where(self._latest.isfinite().all(), counted, 0.0)
        self._sums = counted if self._sums is None else self._sums.to(counted.device) + counted
        self._samples += samples
        now = time.perf_counter()
        self._steps.append(now - self._last)
        self._last = now

    def latest(self) -> dict[str, float]:
        return dict(zip(self._names, self._latest.tolist(), strict=True))

    def means(self) -> dict[str, float]:
        return over_all(dict(zip(self._names, (self._sums[:-1] / self._sums[-1]).tolist(), strict=True)))

    def rate(self) -> float:
        """Samples a second."""
        return self._samples / (time.perf_counter() - self._since)

    def wait(self) -> float:
        """Share of the epoch's time so far spent waiting for data."""
        return (self._before[1] + self._waited) / (self._before[0] + time.perf_counter() - self._since)

    def step_ms(self) -> dict[str, float]:
        """Milliseconds a step took, waiting for data included: median, 95th percentile, and the longest."""
        seconds = torch.tensor(self._steps, dtype=torch.float64)
        figures = torch.quantile(seconds, torch.tensor([0.5, 0.95, 1.0], dtype=torch.float64)) * 1e3
        return dict(zip(("p50", "p95", "max"), figures.tolist(), strict=True))

    def store(self, at: Progress, skipped: int) -> None:
        at.sums, at.skipped = self._sums.tolist(), self._skipped + skipped
        at.seconds = self._before[0] + time.perf_counter() - self._since
        at.waited = self._before[1] + self._waited


def over_all(means: dict[str, float]) -> dict[str, float]:
    """Means over samples, with a loss for each token as the mean over all tokens."""
    return {**means, "loss": means["nats"] / means["tokens"]} if {"nats", "tokens"} <= means.keys() else means


def rates(feed: Feed, samples: float) -> dict[str, float]:
    """Samples a second, and of running text tokens a second."""
    tokens = getattr(feed, "block", 0)
    return {"samples_per_second": samples} | ({"tokens_per_second": samples * tokens} if tokens else {})


def epochs(path: Path) -> list[dict[str, Any]]:
    """The records of epochs in metrics.jsonl, in order; damaged lines are left out."""
    return [record for _, record in _lines(path) if record.get("kind") == "epoch"]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line that is whole, and its record."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) in (int, float):
            yield line, record


class Metrics(contextlib.AbstractContextManager):
    """Appends JSON lines; first drops those after the step at which a run resumes, and damaged ones.

    Without a path nothing is written. A board gets each record too.
    """

    def __init__(self, path: Path | None, step: int, board: Board | None = None) -> None:
        self._board = board
        if path is None:
            self._file: TextIO = io.StringIO()
            return
        kept = [line + "\n" for line, record in _lines(path) if record["step"] <= step]
        atomic_files.write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **record: Any) -> None:
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.record(record)

    def synchronize(self) -> None:
        """Put what is written onto the disk: a checkpoint must not outlive the records before it."""
        os.fsync(self._file.fileno())

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _finite(x: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x
