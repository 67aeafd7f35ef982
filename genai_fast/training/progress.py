"""What a training run shows: a progress bar in a terminal, elsewhere a line for each epoch and one now and then."""

from __future__ import annotations

import contextlib
import time
from typing import Any, TextIO

from genai_fast.errors import require
from genai_fast.terminal import Steady, printable

_SHORT = {"discriminator": "D", "generator": "G"}
_SHOWN = (2, 100)  # lines of a sample, and characters of each
_REDRAW = 0.1  # seconds from one redrawing of the progress bar to the next
_FIRST, _EVERY = 3.0, 30.0  # seconds after which a line is due that no epoch has ended


def display(stream: TextIO, total: int) -> Lines | Bar:
    """What suits the stream; `total` samples make the run. If its reader goes, the run does not."""
    stream = Steady(stream)
    return (Bar if stream.isatty() else Lines)(stream, total)


def _text(terms: dict[str, float], validation: dict[str, float]) -> str:
    """The loss beside its value in validation; without one loss, every term: short enough for 80 columns with a bar."""
    if "loss" in terms:
        terms = {"loss": terms["loss"], **({"validation": validation["loss"]} if "loss" in validation else {})}
    return "  ".join(f"{_SHORT.get(name, name)} {value:.2f}" for name, value in terms.items())


def _rate(rates: dict[str, Any]) -> str:
    tokens = rates.get("tokens_per_second")
    return f"{rates['samples_per_second']:,.0f} samples/s" if tokens is None else f"{tokens:,.0f} tokens/s"


def _excerpt(text: str) -> list[str]:
    """A sample's first lines with something in them, none with characters that a terminal obeys."""
    lines = [line for line in text.splitlines() if line.strip()][: _SHOWN[0]]
    cut = [line if len(line) <= _SHOWN[1] else line[: _SHOWN[1]] + " ..." for line in lines]
    return [f"  | {printable(line)}".replace("\t", "\ufffd") for line in cut]


class Lines(contextlib.AbstractContextManager):
    """A line for each epoch, one every half a minute within it, and each warning once."""

    def __init__(self, stream: TextIO, total: int = 1) -> None:
        self._stream, self._total = stream, total
        self._due, self._epoch, self._terms = time.monotonic() + _FIRST, "", "first steps"

    def begin(self, epoch: int, epochs: int) -> None:
        self._epoch = f"epoch {epoch}/{epochs}"

    def step(self, done: int) -> None:
        """This many samples are done."""
        if time.monotonic() >= self._due:
            self._print(f"{self._epoch}  {self._terms}  {done / self._total:.1%} of the run")

    def terms(self, terms: dict[str, float], rates: dict[str, float]) -> None:
        """The latest losses and rates, printed with the next line that is due."""
        self._terms = f"{_text(terms, {})}  {_rate(rates)}"

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        text, validation = _text(record["train"], record["validation"]), record["validation"]
        if "frechet_distance" in validation:
            text += f"  Fréchet distance {validation['frechet_distance']:.2f}"
        self._print(f"epoch {record['epoch']}/{epochs}  {text}  {_rate(record)}")

    def sample(self, text: str) -> None:
        for line in _excerpt(text):
            self._print(line)

    def warn(self, message: str) -> None:
        self._print(f"warning: {message}")

    def _print(self, line: str) -> None:
        self._due = time.monotonic() + _EVERY
        print(printable(line), file=self._stream, flush=True)

    def __exit__(self, *exception: object) -> None:
        pass


class Bar:
    """A bar with the losses, samples/s and the time left."""

    def __init__(self, stream: TextIO, total: int) -> None:
        rich = require("rich.progress", "train")
        console = require("rich.console", "train").Console(file=stream)
        fields = ("epoch {task.fields[epoch]}", "{task.fields[text]}", "{task.fields[rate]}")
        epoch, *texts = map(rich.TextColumn, fields)
        columns = (epoch, rich.BarColumn(bar_width=12), *texts, rich.TimeRemainingColumn())
        # Its thread would compete with the kernels' threads.
        self._bar = rich.Progress(*columns, console=console, auto_refresh=False)
        # The first step of a convolutional model takes some seconds: its convolutions' paths are measured.
        self._task = self._bar.add_task("", total=total, epoch=1, text="first step ...", rate="")
        self._validation: dict[str, float] = {}
        self._drawn = 0.0

    def begin(self, epoch: int, epochs: int) -> None:
        self._bar.update(self._task, epoch=f"{epoch}/{epochs}")

    def step(self, done: int) -> None:
        """This many samples are done; the losses may still be being computed on a device."""
        now = time.monotonic()
        if now - self._drawn > _REDRAW:
            self._drawn = now
            self._bar.update(self._task, completed=done, refresh=True)

    def terms(self, terms: dict[str, float], rates: dict[str, float]) -> None:
        """The latest losses and rates, drawn with the next step."""
        self._bar.update(self._task, text=_text(terms, self._validation), rate=_rate(rates))

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        self._validation = record["validation"]
        self._bar.update(self._task, text=_text(record["train"], self._validation))
        if record["epoch"] == epochs:
            self._bar.update(self._task, completed=self._bar.tasks[0].total)
        self._bar.refresh()

    def sample(self, text: str) -> None:
        for line in _excerpt(text):
            self._bar.console.print(line, markup=False, highlight=False)

    def warn(self, message: str) -> None:
        self._bar.console.print(printable(f"warning: {message}"), markup=False, highlight=False)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
