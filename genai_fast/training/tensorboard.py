"""A run's figures, pictures and texts for TensorBoard, in folder tensorboard/ of the run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from genai_fast.errors import require

FOLDER = "tensorboard"


class Board(contextlib.AbstractContextManager):
    """Writes events of a run that continues after `step`; what an earlier process wrote of later steps is hidden.

    Pictures and texts belong to the step of the last record. Close it, or leave it as a context: events wait in a
    queue.

    Raises UsageError: the package is not installed.
    """

    def __init__(self, run: Path, step: int) -> None:
        require("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer, self._step = SummaryWriter(str(run / FOLDER), purge_step=step + 1), step

    def record(self, record: dict[str, Any]) -> None:
        """The numbers of a record of metrics.jsonl, such as step/loss, train/loss, validation/loss, step_ms/p50."""
        self._step = record["step"]
        for key, value in record.items():
            numbers = {f"{key}/{name}": x for name, x in value.items()} if isinstance(value, dict) else {}
            if isinstance(value, (int, float)) and key not in ("step", "epoch"):
                numbers = {f"{record['kind']}/{key}": value}
            for name, number in numbers.items():
                self._writer.add_scalar(name, number, self._step)

    def picture(self, name: str, sheet: torch.Tensor) -> None:
        """A picture [C, H, W], uint8, C 1 or 3."""
        self._writer.add_image(name, sheet, self._step)

    def text(self, name: str, text: str) -> None:
        """A text as it is: TensorBoard takes Markdown, where indented lines are code."""
        self._writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), self._step)

    def __exit__(self, *exception: object) -> None:
        self._writer.close()
