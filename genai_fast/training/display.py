"""What a training run shows: a progress bar in a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import math
import time
from typing import Any, TextIO

from genai_fast.errors import require

_REDRAW = 0.1  # seconds from one redrawing of the progress bar to the next


def display(stream: TextIO, total: int) -> Lines | Bar:
    """What suits the stream; `total` samples make the run."""
    return Bar(stream, total) if stream.isatty() else Lines(stream)


def _text(terms: dict[str, float], validation: dict[str, float]) -> str:
    """The loss beside its value in validation; without one loss, every term and the first figure of validation."""
    if "loss" in terms:
        shown = {"loss": terms["loss"], "validation": validation.get("loss", math.nan)}
    else:
        shown = {**terms, **dict(list(validation.items())[:1])}
    return "  ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in shown.items())


class Lines:
    """A line an epoch, and each warning once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def steps(self, done: int, terms: dict[str, float], rate: float) -> None:
        pass

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        rate = f"{record['samples_per_second']:,.0f} samples/s"
        self._print(f"epoch {record['epoch']}/{epochs}  {_text(record['train'], record['validation'])}  {rate}")

    def warn(self, message: str) -> None:
        self._print(f"warning: {message}")

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class Bar:
    """A bar with the losses, samples/s and the time left."""

    def __init__(self, stream: TextIO, total: int) -> None:
        rich = require("rich.progress", "train")
        console = require("rich.console", "train").Console(file=stream)
        self._bar = rich.Progress(
            rich.TextColumn("epoch {task.fields[epoch]}"),
            rich.BarColumn(bar_width=24),
            rich.TextColumn("{task.fields[text]}"),
            rich.TextColumn("{task.fields[rate]:,.0f} samples/s"),
            rich.TimeRemainingColumn(),
            console=console,
            auto_refresh=False,  # its thread would compete with the kernels' threads
        )
        self._task = self._bar.add_task("", total=total, epoch=1, text="", rate=math.nan)
        self._validation: dict[str, float] = {}
        self._drawn = 0.0

    def steps(self, done: int, terms: dict[str, float], rate: float) -> None:
        now = time.monotonic()
        if now - self._drawn > _REDRAW:
            self._drawn = now
            text = _text(terms, self._validation)
            self._bar.update(self._task, completed=done, text=text, rate=rate, refresh=True)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        self._validation, number = record["validation"], min(record["epoch"] + 1, epochs)
        self._bar.update(self._task, epoch=f"{number}/{epochs}", text=_text(record["train"], self._validation))
        if record["epoch"] == epochs:
            self._bar.update(self._task, completed=self._bar.tasks[0].total)
        self._bar.refresh()

    def warn(self, message: str) -> None:
        self._bar.console.print(f"warning: {message}", markup=False, highlight=False)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
