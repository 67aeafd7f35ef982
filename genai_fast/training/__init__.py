"""The training step, the loop, checkpoints and configuration."""

from genai_fast.training.checkpoint import CheckpointError
from genai_fast.training.config import ConfigError
from genai_fast.training.loop import TrainingInterrupted, TrainingStopped, fit
from genai_fast.training.optimizer import make_optimizer
from genai_fast.training.step import Step

__all__ = ["CheckpointError", "ConfigError", "Step", "TrainingInterrupted", "TrainingStopped", "fit", "make_optimizer"]
