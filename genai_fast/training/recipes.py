"""What the command line can train: a table of recipes, and runs of them in folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genai_fast import data
from genai_fast.data import Images
from genai_fast.errors import UsageError, require
from genai_fast.models import MLPVAE
from genai_fast.training import checkpoint, config, pictures
from genai_fast.training.config import Config, ConfigError, VAEConfig
from genai_fast.training.loop import fit
from genai_fast.training.step import make_optimizer

CONFIG = "config.toml"
# What a resumed run may change.
ON_RESUME = ("epochs", "threads", "device", "log_every", "checkpoint_every")


@dataclass(frozen=True)
class Recipe:
    """A model, its configuration, and the pictures of a trained one.

    build(config, (C, H, W)) makes a model with `training_step(batch)` and `sample(count, seed=...)`;
    draw(model, train, validation, folder) writes pictures.
    """

    summary: str
    config: type[Config]
    build: Callable[[Any, tuple[int, int, int]], nn.Module]
    draw: Callable[[Any, Images, Images, Path], None]


def _build_vae(config: VAEConfig, shape: tuple[int, int, int]) -> MLPVAE:
    size = shape[0] * shape[1] * shape[2]
    return MLPVAE(size, config.hidden, config.latent, beta=config.beta, likelihood=config.likelihood)


def _draw_vae(model: MLPVAE, train: Images, validation: Images, folder: Path) -> None:
    pictures.grid(model.sample(64, seed=1).view(-1, *train.shape), folder / "samples.png")
    device = model.fc1.weight.device
    originals = validation.batch(slice(0, 12)).to(device)
    pair = torch.cat([originals, model.reconstruct(originals)])
    pictures.grid(pair, folder / "reconstructions.png", columns=len(originals))
    if model.latent == 2 and train.labels is not None:
        with torch.no_grad():
            mu = model.encode(train.batch(slice(None)).to(device))[0]
        pictures.plane(mu, train.labels, train.classes, folder / "latent.png")


RECIPES = {
    "vae": Recipe("variational autoencoder of one hidden layer, on images", VAEConfig, _build_vae, _draw_vae),
}


@dataclass(frozen=True)
class Trained:
    """A finished run, in memory."""

    folder: Path
    config: Config
    model: nn.Module
    train: Images
    record: dict[str, Any]  # of the last epoch


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
    """
    recipe = RECIPES[name]
    for module in ("safetensors.torch", "PIL.Image", "rich.progress", "matplotlib.figure"):
        require(module, "train")  # now rather than after the training
    device = device_of(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    images = data.load(settings.data, settings.size or None)
    training, validation = images.split(settings.validation, settings.seed)
    about = {"recipe": name, "shape": list(images.shape), "images": len(images)}
    newest = checkpoint.latest(folder) if resume else None
    if newest and (found := checkpoint.read_state(newest)["about"]) != about:
        raise UsageError(f"{newest}: expected a run of {about}, got {found}; remedy: resume with the same data")
    if not resume and any(folder.glob("checkpoint-*")):  # one that stopped before its first may be begun anew
        raise UsageError(f"{folder}: a run of this name exists; remedy: --resume, or another name with --run")
    torch.manual_seed(settings.seed)
    model = recipe.build(settings, images.shape).to(device)
    optimizer = make_optimizer(model, settings)
    state = checkpoint.restore(newest, model, optimizer, threads=not settings.threads) if newest else None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(config.to_toml(settings, name), encoding="utf-8")
    record = fit(model, optimizer, training, validation, settings, folder, about=about, resume=state)
    model.eval()
    recipe.draw(model, training, validation, folder)
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


def open_run(folder: Path) -> tuple[nn.Module, tuple[int, int, int]]:
    """The newest model of a run, on the CPU and in evaluation mode, and its images' (C, H, W)."""
    newest = checkpoint.latest(folder)
    about = checkpoint.read_state(newest)["about"]
    try:
        name, shape = about["recipe"], tuple(about["shape"])
        recipe = RECIPES[name]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{newest}: expected a run of {', '.join(RECIPES)}, got {about}") from error
    settings = config.build(recipe.config, config.read(folder / CONFIG, name), str(folder / CONFIG))
    model = recipe.build(settings, shape)
    checkpoint.load_model(newest, model)
    return model.eval(), shape
