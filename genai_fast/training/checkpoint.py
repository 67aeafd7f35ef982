"""Checkpoints: tensors in safetensors, the rest in JSON, written atomically, read without executing anything.

A run's folder holds `checkpoint-<step>/` with

    model.safetensors     the model's state_dict: loads into any tool
    training.safetensors  "optimizer.<parameter>.<name>", the random generators' states "rng.<device>", and
                          "carried.<name>": what a recurrent model carries from batch to batch
    state.json            version, progress, optimizer settings, and where it ran

They are written into a hidden folder, synchronized, and renamed as one: a folder of that name is complete.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genai_fast import backends
from genai_fast.errors import UsageError, require
from genai_fast.kernels.common import extension
from genai_fast.training import distributed

VERSION = 1
_FORMAT = "genai-fast checkpoint"
_CARRIED = "carried."
_NAME = re.compile(r"checkpoint-(\d{9})")
# How a step is carried out, as against what it computes: these stay as the present optimizer has them.
_EXECUTION = ("foreach", "fused", "capturable", "differentiable")


class CheckpointError(UsageError):
    """A checkpoint that is missing, truncated, foreign or does not fit; the message names file and remedy."""


def save(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    progress: dict,
    about: dict,
    keep: int = 2,
) -> Path:
    """Write checkpoint-<step> into folder `run`, and remove all but the `keep` newest.

    Args:
        step: optimizer steps done.
        progress, about: anything in JSON that the caller wants back.
    """
    save_file = require("safetensors.torch", "train").save_file
    final = run / f"checkpoint-{step:09d}"
    temporary = run / f".{final.name}.new"
    for left in run.glob(".checkpoint-*"):  # by a process that was killed
        shutil.rmtree(left)
    temporary.mkdir(parents=True)
    tag = {"format": "pt", "genai_fast_step": str(step)}
    save_file(plain(model.state_dict()), temporary / "model.safetensors", tag)
    settings = optimizer.state_dict()
    tensors = {
        f"optimizer.{index}.{name}": value
        for index, values in settings["state"].items()
        for name, value in values.items()
    }
    carried = {f"{_CARRIED}{name}": x for name, x in model.carried().items()} if hasattr(model, "carried") else {}
    save_file(plain({**tensors, **carried, **_generators()}), temporary / "training.safetensors", tag)
    state = {
        "format": _FORMAT,
        "version": VERSION,
        "step": step,
        "progress": progress,
        "about": about,
        "optimizer": [{k: _number(v) for k, v in group.items()} for group in settings["param_groups"]],
        "environment": environment(next(model.parameters()).device),
    }
    (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _synchronize(path)
    _remove(final)  # left by an earlier run of the same step
    os.rename(temporary, final)
    _synchronize(run)
    for old in _all(run)[keep:]:
        _remove(old)
    return final


def latest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    found = _all(run)
    if not found:
        raise CheckpointError(f"{run}: expected a run with checkpoint-<step> folders, got none; remedy: train it first")
    return found[0]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json, checked."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint's state, got {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: expected JSON, got {error}; remedy: remove it; the one before serves"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: expected a {_FORMAT}, got another kind of file")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: expected version {VERSION}, got {state.get('version')};"
            f" remedy: read it with the genai_fast that wrote it"
        )
    missing = {"step", "progress", "about", "optimizer", "environment"} - state.keys()
    if missing:
        raise CheckpointError(
            f"{path}: expected {', '.join(sorted(missing))} in it; remedy: remove it; the one before serves"
        )
    return state


def load_model(checkpoint: Path, model: nn.Module) -> None:
    """Put the checkpoint's weights into the model."""
    _fill_model(checkpoint, model, read_state(checkpoint))


def load_matching(path: Path, model: nn.Module) -> tuple[int, list[str]]:
    """Put what fits of a safetensors file into the model; returns how many tensors, and what does not match.

    Raises:
        CheckpointError: the file cannot be read, or nothing in it fits.
    """
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a whole safetensors file, got {error}") from error
    wanted = model.state_dict()
    fitting = {k: v for k, v in tensors.items() if k in wanted and wanted[k].shape == v.shape}
    if not fitting:
        raise CheckpointError(
            f"{path}: expected weights of a {type(model).__name__}, got no tensor that fits; it holds"
            f" {', '.join(sorted(tensors)[:4]) or 'nothing'}; remedy: the same recipe and sizes"
        )
    model.load_state_dict(fitting, strict=False)
    left = []
    for key in sorted((wanted.keys() | tensors.keys()) - fitting.keys()):
        want, got = (tuple(x[key].shape) if key in x else "nothing" for x in (wanted, tensors))
        left.append(f"{key} (expected {want}, got {got})")
    return len(fitting), left


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, threads: bool = True) -> dict:
    """Put back model, optimizer, random generators and (if `threads`) the thread count; returns state.json.

    Warns where this machine differs from the one that wrote it: then the run goes on, but not bit for bit.
    """
    state = read_state(checkpoint)
    tensors = _tensors(checkpoint / "training.safetensors", state["step"])
    restored = _optimizer_state(checkpoint, optimizer, state["optimizer"], tensors)
    _fill_model(checkpoint, model, state)
    optimizer.load_state_dict(restored)
    if hasattr(model, "load_carried"):
        model.load_carried({k.removeprefix(_CARRIED): v for k, v in tensors.items() if k.startswith(_CARRIED)})
    if threads and state["environment"].get("processes", 1) == distributed.size():
        torch.set_num_threads(state["environment"]["threads"])
    _set_generators(checkpoint, tensors)
    now = environment(next(model.parameters()).device)
    different = [f"{k}: {v} then, {now.get(k)} now" for k, v in state["environment"].items() if now.get(k) != v]
    if different:
        warnings.warn(
            f"{checkpoint}: the run goes on, but not bit for bit: {'; '.join(different)}",
            UserWarning,
            stacklevel=2,
        )
    return state


def environment(device: torch.device) -> dict[str, Any]:
    """What decides the bits of a result on this machine."""
    on_cuda = device.type == "cuda"
    served = {name: backends.choose(name, backends.forced_backend(), device.type)[0] for name in backends.FOLDERS}
    isa = extension.cpu_kernels()[1] if "cpu" in served.values() else "none"
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
        "isa": isa,
        "backends": served,
    }


def _all(run: Path) -> list[Path]:
    """Newest first."""
    found = run.iterdir() if run.is_dir() else ()
    return sorted((p for p in found if _NAME.fullmatch(p.name)), reverse=True)


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU, as safetensors takes them."""
    # Copies: safetensors takes neither strided tensors nor two that share memory (tied weights).
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}


def _generators() -> dict[str, torch.Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"rng.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_generators(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if not name.startswith("rng."):
            continue
        index = name.removeprefix("rng.cuda.")
        try:
            if name == "rng.cpu":
                torch.set_rng_state(value)
            elif int(index) < torch.cuda.device_count():
                torch.cuda.set_rng_state(value, int(index))
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{checkpoint}: {name}: expected a generator's state, got {error}") from error


def _tensors(path: Path, step: int) -> dict[str, torch.Tensor]:
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("genai_fast_step")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: expected a whole safetensors file, got {error}; remedy: remove it; the one before serves"
        ) from error
    if found != str(step):
        raise CheckpointError(
            f"{path}: expected tensors of step {step}, got step {found}; the files do not belong together"
        )
    return tensors


def _fill_model(checkpoint: Path, model: nn.Module, state: dict) -> None:
    path = checkpoint / "model.safetensors"
    tensors = _tensors(path, state["step"])
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    got = {k: tuple(v.shape) for k, v in tensors.items()}
    for key in sorted(wanted.keys() | got.keys()):
        if wanted.get(key) != got.get(key):
            raise CheckpointError(
                f"{path}: {key}: expected {wanted.get(key, 'nothing')} as {type(model).__name__} has, got"
                f" {got.get(key, 'nothing')}; remedy: build the model with the run's own settings"
            )
    model.load_state_dict(tensors)


def _optimizer_state(
    checkpoint: Path, optimizer: torch.optim.Optimizer, groups: list[dict], tensors: dict[str, torch.Tensor]
) -> dict:
    present = optimizer.state_dict()["param_groups"]
    if [g["params"] for g in groups] != [g["params"] for g in present]:
        raise CheckpointError(
            f"{checkpoint}: expected an optimizer of {sum(len(g['params']) for g in present)} parameters in"
            f" {len(present)} groups, got {sum(len(g['params']) for g in groups)} in {len(groups)}"
        )
    parameters = dict(enumerate(p for g in optimizer.param_groups for p in g["params"]))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith("optimizer."):
            continue
        index, _, name = key.removeprefix("optimizer.").partition(".")
        shape = parameters[int(index)].shape if index.isdecimal() and int(index) in parameters else None
        if shape is None or (value.dim() and value.shape != shape):  # 0-d: a count of steps
            raise CheckpointError(
                f"{checkpoint}: {key}: expected {'no such tensor' if shape is None else tuple(shape)},"
                f" got {tuple(value.shape)}; remedy: remove it; the one before serves"
            )
        state.setdefault(int(index), {})[name] = value
    merged = []
    for old, new in zip(groups, present, strict=True):
        settings = {k: tuple(v) if k == "betas" else v for k, v in old.items()}  # JSON has lists only
        if isinstance(new["lr"], torch.Tensor):
            settings["lr"] = torch.full_like(new["lr"], settings["lr"])
        merged.append({**settings, **{k: new[k] for k in _EXECUTION if k in new}})
    return {"state": state, "param_groups": merged}


def _number(x: Any) -> Any:
    """JSON has no tensors: a rate that is one becomes a number."""
    return x.item() if isinstance(x, torch.Tensor) else x


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that at no time half of one carries its name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def _synchronize(path: Path) -> None:
    """fsync a file or a folder."""
    if os.name == "nt" and path.is_dir():  # Windows has no such call
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
