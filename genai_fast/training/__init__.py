"""The training step, the loop, checkpoints and the optimizer; each module is imported when something of it is used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genai_fast.config import ConfigError
    from genai_fast.training.checkpoint import CheckpointError, DiskError
    from genai_fast.training.loop import TrainingInterrupted, TrainingStopped, fit
    from genai_fast.training.optimizer import make_optimizer
    from genai_fast.training.step import Step

_HOMES = dict.fromkeys(("CheckpointError", "DiskError"), "training.checkpoint") | {"ConfigError": "config"}
_HOMES |= dict.fromkeys(("TrainingInterrupted", "TrainingStopped", "fit"), "training.loop")
_HOMES |= {"Step": "training.step", "make_optimizer": "training.optimizer"}

__all__ = [
    "CheckpointError", "ConfigError", "DiskError", "Step", "TrainingInterrupted", "TrainingStopped", "fit",
    "make_optimizer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"genai_fast.{_HOMES[name]}"), name)
