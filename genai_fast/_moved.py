"""Modules under their former names, for one version: they warn, and give what their new place gives."""

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

MOVED = {
    **{name: f"cli.{name}" for name in ("commands", "demo", "doctor", "examples", "tune")},
    **{f"training.{name}": f"runs.{name}" for name in ("export", "image_task", "pictures", "text_task")},
    "fuse": "swap",
    "models.adversarial": "models.gan.model",
    "models.gan_conditional": "models.gan.dcgan",
    "models.gan_mlp": "models.gan.dense",
    "models.generation": "models.common.generation",
    "models.latents": "models.common.latents",
    "models.lstm_lm": "models.lstm.model",
    "paths": "autotune",
    "training.board": "training.tensorboard",
    "training.config": "config",
    "training.disk": "atomic_files",
    "training.display": "training.progress",
    "training.feed": "training.batches",
    "training.kept": "training.buffer_snapshot",
    "training.losses": "training.loss_output",
    "training.recipes": "models.registry",
    "training.runs": "runs.run",
    "training.standalone": "runs.export_template",
    "training.watch": "runs.image_evaluation",
    "training.writing": "runs.text_generation",
}


class _Moved(ModuleType):
    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"Moved to {new}.")
        self.__dict__["_new"] = new

    def __getattr__(self, name: str) -> Any:
        # What looks through sys.modules (inspect, doctest, unittest) asks for these alone.
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(self._new), name)
        warnings.warn(
            f"{self.__name__} is deprecated and ends with the next version; import {name} from {self._new}",
            DeprecationWarning,
            stacklevel=2,
        )
        return value

    def __dir__(self) -> list[str]:
        return dir(importlib.import_module(self._new))


def install() -> None:
    """Enter the former names in sys.modules. A function that has a module's former name stays the attribute."""
    for old, new in MOVED.items():
        sys.modules.setdefault(f"genai_fast.{old}", _Moved(f"genai_fast.{old}", f"genai_fast.{new}"))
