"""The training step, the loop, checkpoints and the optimizer; each module is imported when something of it is used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genai_fast.config import ConfigError
    from genai_fast.training.checkpoint import CheckpointError, DiskError
    from genai_fast.training.loop import TrainingInterrupted, TrainingStopped, fit
    from genai_fast.training.optimizer import make_optimizer
    from genai_fast.training.step import Step

_HOMES = {
    "CheckpointError": "genai_fast.training.checkpoint",
    "ConfigError": "genai_fast.config",
    "DiskError": "genai_fast.training.checkpoint",
    "Step": "genai_fast.training.step",
    "TrainingInterrupted": "genai_fast.training.loop",
    "TrainingStopped": "genai_fast.training.loop",
    "fit": "genai_fast.training.loop",
    "make_optimizer": "genai_fast.training.optimizer",
}

__all__ = [
    "CheckpointError", "ConfigError", "DiskError", "Step", "TrainingInterrupted", "TrainingStopped", "fit",
    "make_optimizer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
