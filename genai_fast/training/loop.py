"""The loop: epochs, validation, metrics.jsonl, checkpoints, a progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from genai_fast.data.images import Images, batches
from genai_fast.errors import UsageError, require
from genai_fast.training import checkpoint
from genai_fast.training.config import Config
from genai_fast.training.step import Step

METRICS = "metrics.jsonl"
_REDRAW = 0.1  # seconds from one redrawing of the progress bar to the next


class TrainingStopped(UsageError):
    """Training cannot go on: the loss is no longer a number."""


@dataclass
class Progress:
    """Where a run stands: the next batch, and the epoch's losses times batch sizes so far (`sums`)."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0  # spent on this epoch's steps
    sums: list[float] = field(default_factory=list)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Images,
    validation: Images,
    config: Config,
    run: Path,
    *,
    about: dict[str, Any] | None = None,
    resume: dict[str, Any] | None = None,
    stream: TextIO | None = None,
) -> dict[str, Any]:
    """Train until `config.epochs`; leave metrics.jsonl and checkpoints in folder `run`.

    metrics.jsonl holds one JSON object a line, losses in nats a sample: {"kind": "step", "epoch", "step",
    "samples_per_second", <the model's losses>} every `config.log_every` steps and at the end of an epoch, and
    {"kind": "epoch", "epoch", "step", "samples_per_second", "train": {<losses>}, "validation": {<losses>}}
    after it. Epochs and steps count from 1.

    Args:
        about: JSON data stored with each checkpoint.
        resume: what `checkpoint.restore` returned, to go on from there.
        stream: where the progress bar goes, or a line an epoch if it is no terminal; None: stderr.

    Returns:
        The last epoch's record.

    Raises:
        TrainingStopped: the loss became infinite or NaN. CheckpointError: `resume` is of another kind.
    """
    at = _progress(resume)
    step = Step(model, optimizer, clip=config.clip)
    steps_an_epoch = math.ceil(len(train) / config.batch_size)
    total = config.epochs * len(train)
    record: dict[str, Any] = {}

    def save() -> None:
        checkpoint.save(run, model, optimizer, at.step, asdict(at), about or {})

    with _Metrics(run / METRICS, at.step) as metrics, _display(stream or sys.stderr, total) as display:
        while at.epoch < config.epochs:
            model.train()
            meter = _Meter(at)
            for x in batches(train, config.batch_size, config.seed, at.epoch, at.batch):
                meter.add(step(x), len(x))
                at.batch, at.step = at.batch + 1, at.step + 1
                last = at.batch == steps_an_epoch
                if last or at.step % config.log_every == 0:
                    terms, rate = meter.latest(), meter.rate()
                    _check(terms, at, run)
                    metrics.write(kind="step", epoch=at.epoch + 1, step=at.step, samples_per_second=rate, **terms)
                    done = at.epoch * len(train) + min(at.batch * config.batch_size, len(train))
                    display.steps(done, terms["loss"], rate)
                if config.checkpoint_every and at.step % config.checkpoint_every == 0 and not last:
                    meter.store(at)
                    _check({"loss": math.fsum(at.sums)}, at, run)
                    save()
            meter.store(at)
            record = {
                "kind": "epoch",
                "epoch": at.epoch + 1,
                "step": at.step,
                "samples_per_second": len(train) / at.seconds,
                "train": meter.means(len(train)),
                "validation": evaluate(model, validation, config),
            }
            _check(record["train"], at, run)
            metrics.write(**record)
            display.epoch(record, config.epochs)
            at = Progress(epoch=at.epoch + 1, step=at.step)
            save()
    return record


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, config: Config) -> dict[str, float]:
    """The model's losses, means over all images, in evaluation mode; the same noise every time."""
    device = next(model.parameters()).device
    training, sums = model.training, None
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        for first in range(0, len(images), config.batch_size):
            x = images.batch(slice(first, first + config.batch_size))
            losses = model.training_step(x.to(device))
            weighted = torch.stack(tuple(losses)).double() * len(x)
            sums = weighted if sums is None else sums + weighted
    model.train(training)
    return dict(zip(losses._fields, (sums / len(images)).tolist(), strict=True))


class _Meter:
    """The losses of an epoch, summed on the device, and its clock."""

    def __init__(self, at: Progress) -> None:
        self._sums = torch.tensor(at.sums, dtype=torch.float64) if at.sums else None
        self._before, self._since, self._samples = at.seconds, time.perf_counter(), 0

    def add(self, losses: Any, samples: int) -> None:
        self._names, self._latest = losses._fields, torch.stack(tuple(losses)).double()
        weighted = self._latest * samples
        self._sums = weighted if self._sums is None else self._sums.to(weighted.device) + weighted
        self._samples += samples

    def latest(self) -> dict[str, float]:
        return dict(zip(self._names, self._latest.tolist(), strict=True))

    def means(self, samples: int) -> dict[str, float]:
        return dict(zip(self._names, (self._sums / samples).tolist(), strict=True))

    def rate(self) -> float:
        """Samples a second."""
        return self._samples / (time.perf_counter() - self._since)

    def store(self, at: Progress) -> None:
        at.sums, at.seconds = self._sums.tolist(), self._before + time.perf_counter() - self._since


def _progress(resume: dict[str, Any] | None) -> Progress:
    if resume is None:
        return Progress()
    try:
        return Progress(**resume["progress"])
    except TypeError as error:
        raise checkpoint.CheckpointError(f"checkpoint: progress: expected {Progress()}, got {error}") from error


def _check(terms: dict[str, float], at: Progress, run: Path) -> None:
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    if bad:
        raise TrainingStopped(
            f"{run}: training stopped at step {at.step} (epoch {at.epoch + 1}): {', '.join(bad)} became"
            f" {terms[bad[0]]}. The last checkpoint is from before. Remedy: a smaller --lr, or --clip 1"
        )


class _Metrics:
    """Appends JSON lines; first drops those after the step at which a run goes on, and a half-written one."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept.append(line + "\n")
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **record: Any) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __enter__(self) -> _Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _display(stream: TextIO, total: int) -> _Lines | _Bar:
    return _Bar(stream, total) if stream.isatty() else _Lines(stream)


class _Lines:
    """A line an epoch."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def steps(self, done: int, loss: float, rate: float) -> None:
        pass

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        train, validation = record["train"]["loss"], record["validation"]["loss"]
        print(
            f"epoch {record['epoch']}/{epochs}  loss {train:.2f}  validation {validation:.2f}"
            f"  {record['samples_per_second']:,.0f} samples/s",
            file=self._stream,
            flush=True,
        )

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class _Bar:
    """A bar with loss, validation loss, samples/s and the time left."""

    def __init__(self, stream: TextIO, total: int) -> None:
        rich = require("rich.progress", "train")
        console = require("rich.console", "train").Console(file=stream)
        self._bar = rich.Progress(
            rich.TextColumn("epoch {task.fields[epoch]}"),
            rich.BarColumn(),
            rich.TextColumn("loss {task.fields[loss]:.2f}  validation {task.fields[validation]:.2f}"),
            rich.TextColumn("{task.fields[rate]:,.0f} samples/s"),
            rich.TimeRemainingColumn(),
            console=console,
            auto_refresh=False,  # its thread would compete with the kernels' threads
        )
        self._task = self._bar.add_task("", total=total, epoch=1, loss=math.nan, validation=math.nan, rate=math.nan)
        self._drawn = 0.0

    def steps(self, done: int, loss: float, rate: float) -> None:
        now = time.monotonic()
        if now - self._drawn > _REDRAW:
            self._drawn = now
            self._bar.update(self._task, completed=done, loss=loss, rate=rate, refresh=True)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        validation, number = record["validation"]["loss"], min(record["epoch"] + 1, epochs)
        self._bar.update(self._task, epoch=f"{number}/{epochs}", validation=validation)
        if record["epoch"] == epochs:
            self._bar.update(self._task, completed=self._bar.tasks[0].total, loss=record["train"]["loss"], refresh=True)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
