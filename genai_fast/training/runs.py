"""Runs in folders: begun, resumed, opened again, sampled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genai_fast import data
from genai_fast.data import Images
from genai_fast.errors import UsageError, require
from genai_fast.training import checkpoint, config
from genai_fast.training.config import Config, ConfigError
from genai_fast.training.loop import fit
from genai_fast.training.recipes import RECIPES, make
from genai_fast.training.step import make_optimizer
from genai_fast.training.watch import Watch, draw

CONFIG = "config.toml"
# What a resumed run may change.
ON_RESUME = ("epochs", "threads", "device", "log_every", "checkpoint_every", "grid_every", "quality_every")


@dataclass(frozen=True)
class Trained:
    """A finished run, in memory."""

    folder: Path
    config: Config
    model: nn.Module
    train: Images
    record: dict[str, Any]  # of the last epoch


@dataclass(frozen=True)
class Opened:
    """A run's newest model, on the CPU and in evaluation mode."""

    folder: Path
    recipe: str
    config: Config
    model: nn.Module
    shape: tuple[int, int, int]  # of an image
    classes: tuple[str, ...]  # names of the labels


def new_folder(out: Path, name: str) -> Path:
    """out/name, or out/name-2, -3, ... if that is taken."""
    number, folder = 1, out / name
    while folder.exists():
        number += 1
        folder = out / f"{name}-{number}"
    return folder


def device_of(name: str) -> torch.device:
    """The device that a configuration names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: expected one that works here, got {name!r} ({reason})") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected cpu or cuda, got {name!r}")
    return device


def train(name: str, settings: Config, folder: Path, *, resume: bool = False) -> Trained:
    """Train recipe `name` in `folder`: leaves config.toml, metrics.jsonl, checkpoints and pictures there.

    With `resume`, goes on from the folder's newest checkpoint.

    Raises:
        UsageError: data, device, packages or the folder do not serve; nothing has been written then.
        TrainingStopped, TrainingInterrupted: as `fit` does.
    """
    for module in ("safetensors.torch", "PIL.Image", "rich.progress", "matplotlib.figure"):
        require(module, "train")  # now rather than after the training
    device = device_of(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    images = data.load(settings.data, settings.size or None, strict=settings.strict)
    training, validation = images.split(settings.validation, settings.seed)
    about = {
        "recipe": name, "shape": list(images.shape), "images": len(images),
        "classes": list(images.classes) if RECIPES[name].labelled else [],
    }  # fmt: skip
    newest = checkpoint.latest(folder) if resume else None
    if newest and (found := checkpoint.read_state(newest)["about"]) != about:
        raise UsageError(f"{newest}: expected a run of {about}, got {found}; remedy: resume with the same data")
    if not resume and any(folder.glob("checkpoint-*")):  # one that stopped before its first may be begun anew
        raise UsageError(f"{folder}: a run of this name exists; remedy: --resume, or another name with --run")
    torch.manual_seed(settings.seed)
    model = make(name, settings, images.shape, len(images.classes)).to(device)
    size = settings.batch_size * getattr(model, "n_critic", 1)
    if hasattr(model, "turns") and len(training) < size:
        raise UsageError(
            f"{settings.data}: expected at least {size} images for training, a batch, got {len(training)} besides"
            f" {len(validation)} held out; remedy: more images, or a smaller --batch-size"
        )
    optimizer = make_optimizer(model, settings)
    state = checkpoint.restore(newest, model, optimizer, threads=not settings.threads) if newest else None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(config.to_toml(settings, name), encoding="utf-8")
    watch = Watch(model, training, validation, settings, folder)
    record = fit(model, optimizer, training, validation, settings, folder, about=about, resume=state, after_epoch=watch)
    model.eval()
    draw(model, training, validation, folder)
    return Trained(folder, settings, model, training, record)


def saved_settings(name: str, folder: Path, changes: dict[str, Any]) -> Config:
    """The settings of a run, with the changes that a resumed run may make."""
    path = folder / CONFIG
    fixed = [key for key in changes if key not in ON_RESUME]
    if fixed:
        flags, allowed = (", ".join(f"--{k.replace('_', '-')}" for k in keys) for keys in (fixed, ON_RESUME))
        raise ConfigError(f"--resume goes on with the run's own settings: only {allowed} may change, got {flags}")
    if not path.exists():
        raise UsageError(f"{folder}: expected a run ({CONFIG} in it), got none; remedy: leave --resume out")
    return config.build(RECIPES[name].config, {**config.read(path, name), **changes}, str(path))


def open_run(folder: Path) -> Opened:
    """The newest model of a run."""
    newest = checkpoint.latest(folder)
    about = checkpoint.read_state(newest)["about"]
    try:
        name, shape, classes = about["recipe"], tuple(about["shape"]), tuple(about["classes"])
        recipe = RECIPES[name]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{newest}: expected a run of {', '.join(RECIPES)}, got {about}") from error
    settings = config.build(recipe.config, config.read(folder / CONFIG, name), str(folder / CONFIG))
    model = make(name, settings, shape, len(classes))
    checkpoint.load_model(newest, model)
    return Opened(folder, name, settings, model.eval(), shape, classes)
