"""The training step, the loop, checkpoints and configuration."""

from genai_fast.config import ConfigError
from genai_fast.training.checkpoint import CheckpointError, DiskError
from genai_fast.training.loop import TrainingInterrupted, TrainingStopped, fit
from genai_fast.training.optimizer import make_optimizer
from genai_fast.training.step import Step

__all__ = [
    "CheckpointError", "ConfigError", "DiskError", "Step", "TrainingInterrupted", "TrainingStopped", "fit",
    "make_optimizer",
]  # fmt: skip
