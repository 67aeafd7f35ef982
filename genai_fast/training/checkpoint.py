"""Checkpoints: tensors in safetensors, the rest in JSON, written atomically, read without executing anything.

A run's folder holds `checkpoint-<step>/` with

    model.safetensors     the model's state_dict: loads into any tool
    training.safetensors  "optimizer.<parameter>.<name>", the random generators' states "rng.<device>",
                          "carried.<name>": what a recurrent model carries from batch to batch, and
                          "step.<name>": the Step's counts and the scale of its loss
    state.json            version, progress, optimizer settings, the best step so far, where it ran and by which paths,
                          and the SHA-256 of the other two and of itself

They are written into a hidden folder, synchronized, and renamed as one: a folder of that name is complete.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genai_fast import atomic_files, autotune
from genai_fast.contract import Carries, offers
from genai_fast.errors import UsageError
from genai_fast.terminal import command
from genai_fast.training import distributed, optimizer_state
from genai_fast.training.environment import changes, environment

VERSION = 2
_FORMAT = "genai-fast checkpoint"
_MODEL, _TRAINING = "model.safetensors", "training.safetensors"
_OPTIMIZER, _CARRIED, _STEP = "optimizer.", "carried.", "step."
_NAME = re.compile(r"checkpoint-(\d{9,})")
_TYPES = {
    "step": int, "best": int, "progress": dict, "about": dict, "optimizer": list, "environment": dict, "routes": dict,
    "files": dict, "digest": str,
}  # fmt: skip
_LONGEST_STATE = 1 << 26  # bytes of a state.json
_MOST_THREADS = 4096
_UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOTDIR,
    errno.EEXIST,
}  # fmt: skip


class CheckpointError(UsageError):
    """A checkpoint that is missing, damaged, foreign or does not fit; the message names file and remedy."""


class DiskError(UsageError):
    """A run cannot be written to its disk; the message names the disk, and the checkpoint that stands."""


def save(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, progress: dict, about: dict,
    keep: int = 2, best: int = 0, training_step: dict[str, torch.Tensor] | None = None,
) -> Path:  # fmt: skip
    """Write checkpoint-<step> into folder `run`; then remove all but the `keep` newest and the best.

    Args:
        step: optimizer steps done.
        progress, about: anything in JSON that the caller wants back.
        best: step of the checkpoint that is the best so far, maybe this one; 0 for none.
        training_step: `Step.state_dict()`.

    Raises DiskError: it cannot be written: nothing of it stays, and those before do.
    """
    final = _folder(run, step)
    with writing(run, about.get("recipe", "RECIPE")):
        run.mkdir(parents=True, exist_ok=True)
        for left in run.glob(".checkpoint-*"):  # by a process that was killed
            atomic_files.discard(left)
        with atomic_files.whole(final) as folder:
            folder.mkdir()
            _write(folder, model, optimizer, step, progress, about, best, training_step or {})
            _remove(final)  # left by an earlier run of the same step
        for old in found(run)[keep:]:
            if old != _folder(run, best):
                _remove(old)
    return final


def _write(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, progress: dict, about: dict, best: int,
    training_step: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    """The files of a checkpoint."""
    device = next(model.parameters()).device
    groups, moments = optimizer_state.pack(optimizer)
    moments = {f"{_OPTIMIZER}{name}": x for name, x in moments.items()}
    carried = {f"{_CARRIED}{name}": x for name, x in model.carried().items()} if offers(model, Carries) else {}
    counts = {f"{_STEP}{name}": x for name, x in training_step.items()}
    atomic_files.write_tensors(folder / _MODEL, plain(model.state_dict()))
    atomic_files.write_tensors(folder / _TRAINING, plain({**moments, **carried, **counts, **_generators()}))
    state = {"format": _FORMAT, "version": VERSION, "step": step, "best": best, "progress": progress, "about": about}
    state |= {"optimizer": groups, "environment": environment(device), "routes": autotune.routes(device)}
    state["files"] = {name: atomic_files.digest(folder / name) for name in (_MODEL, _TRAINING)}
    state["digest"] = _digest(state)
    (folder / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")


@contextlib.contextmanager
def writing(run: Path, recipe: str = "RECIPE") -> Iterator[None]:
    """Around what writes into folder `run`: a disk that is full, read-only or broken gets a message of its own."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        stand = found(run)
        stands = f"{stand[0].name} stands" if stand else "there is no checkpoint yet"
        then = f"go on with {resume_command(run, recipe)}" if stand else "begin again"
        reason = f"{error.strerror} ({atomic_files.room(run)})"
        raise DiskError(f"{run}: cannot be written to: {reason}; {stands}; remedy: fix that, then {then}") from error


def resume_command(run: Path, recipe: str = "RECIPE") -> str:
    """What goes on with a run."""
    out = [] if str(run.parent) == "runs" else ["--out", run.parent]
    return command("train", recipe, "--run", run.name, *out, "--resume")


def found(run: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    named = [(m, p) for p in run.iterdir() if (m := _NAME.fullmatch(p.name))] if run.is_dir() else []
    return [p for _, p in sorted(named, key=lambda pair: int(pair[0][1]), reverse=True)]


def latest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    stand = found(run)
    if not stand:
        raise CheckpointError(f"{run}: expected a run with checkpoint-<step> folders, got none; remedy: train it first")
    return stand[0]


def best(run: Path) -> Path:
    """The checkpoint that the newest one names as the best on held-out data."""
    newest = latest(run)
    step = read_state(newest)["best"]
    if not step:
        raise CheckpointError(
            f"{newest}: expected a best checkpoint to be named, got none: no epoch has ended with a validation loss or"
            f" a Fréchet distance; remedy: take the newest"
        )
    path = _folder(run, step)
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected the best checkpoint, got nothing; remedy: take the newest")
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json, checked."""
    path = checkpoint / "state.json"
    try:
        if not path.is_file() or path.stat().st_size > _LONGEST_STATE:
            raise ValueError("no such file" if not path.exists() else "something else")
        state = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        digest = _digest(state) if isinstance(state, dict) else ""
    except FileNotFoundError as error:
        raise _damaged(checkpoint, path, "a checkpoint's state in JSON", "no such file") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(checkpoint, path, "a checkpoint's state in JSON", str(error)) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise _damaged(checkpoint, path, f"a {_FORMAT}", "another kind of file")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: expected version {VERSION}, got {state.get('version')};"
            f" remedy: read it with the genai_fast that wrote it"
        )
    for key, kind in _TYPES.items():
        if type(state.get(key)) is not kind:
            raise _damaged(checkpoint, path, f"{key}: {kind.__name__}", _short(state.get(key)))
    named = _NAME.fullmatch(checkpoint.name)
    if state["digest"] != digest or (named and int(named[1]) != state["step"]):
        raise _damaged(checkpoint, path, "what was saved", "something that was changed since")
    threads, texts = state["environment"].get("threads"), [*state["routes"].values(), *state["files"].values()]
    if type(threads) is not int or not 1 <= threads <= _MOST_THREADS:
        raise _damaged(checkpoint, path, f"environment: threads: 1 to {_MOST_THREADS}", _short(threads))
    if not all(isinstance(x, str) for x in texts) or min(state["step"], state["best"]) < 0:
        raise _damaged(checkpoint, path, "steps >= 0, and names of paths and digests", "others")
    return state


def load_model(checkpoint: Path, model: nn.Module) -> None:
    """Put the checkpoint's weights into the model."""
    _fill_model(checkpoint, model, read_state(checkpoint))


def load_matching(path: Path, model: nn.Module) -> tuple[int, list[str]]:
    """Put what fits of a safetensors file into the model; returns how many tensors, and what does not match.

    Raises CheckpointError: the file cannot be read, or nothing in it fits.
    """
    try:
        tensors = atomic_files.read_tensors(path)
    except atomic_files.Damaged as error:
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
    """Put back model, optimizer, random generators, paths and (if `threads`) the thread count; returns state.json and,
    as "training_step", what `Step.load_state_dict` takes, empty if that was not saved.

    Warns if this machine differs from the one that wrote it: the run then continues, but is no longer bit-exact.
    """
    state = read_state(checkpoint)
    tensors = _tensors(checkpoint, _TRAINING, state)
    try:
        restored = optimizer_state.unpack(optimizer, state["optimizer"], _named(_OPTIMIZER, tensors))
    except optimizer_state.Mismatch as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    except optimizer_state.Damaged as error:
        raise CheckpointError(f"{checkpoint}: {error}; remedy: {_remedy(checkpoint)}") from error
    _fill_model(checkpoint, model, state)
    optimizer.load_state_dict(restored)
    if offers(model, Carries):
        try:
            model.load_carried(_named(_CARRIED, tensors))
        except ValueError as error:
            raise CheckpointError(f"{checkpoint / _TRAINING}: {error}; remedy: {_remedy(checkpoint)}") from error
    if threads and state["environment"].get("processes", 1) == distributed.size():
        torch.set_num_threads(state["environment"]["threads"])
    _set_generators(checkpoint, tensors)
    device = next(model.parameters()).device
    now = environment(device)
    different = changes(state["environment"], now)
    if different:
        warnings.warn(
            f"{checkpoint}: the run continues, but is no longer bit-exact: {_short(different, 1000)}",
            UserWarning,
            stacklevel=2,
        )
    else:
        autotune.take(device, state["routes"])
    state["training_step"] = _named(_STEP, tensors)
    return state


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU, as safetensors takes them."""
    # Copies: safetensors takes neither strided tensors nor two that share memory (tied weights).
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}


def _named(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _generators() -> dict[str, torch.Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"rng.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_generators(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    for name, value in {"rng.cpu": None, **tensors}.items():
        index = name.removeprefix("rng.cuda.")
        try:
            if name == "rng.cpu":
                torch.set_rng_state(value)
            elif index != name and int(index) in range(torch.cuda.device_count()):
                torch.cuda.set_rng_state(value, int(index))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(checkpoint, checkpoint / _TRAINING, f"{name}: a generator's state", str(error)) from error


def _tensors(checkpoint: Path, name: str, state: dict) -> dict[str, torch.Tensor]:
    """A file of tensors, which must be the one that was written with the state."""
    path = checkpoint / name
    try:
        tensors = atomic_files.read_tensors(path)
        digest = atomic_files.digest(path)
    except (atomic_files.Damaged, FileNotFoundError) as error:
        raise _damaged(checkpoint, path, "a whole safetensors file", str(error)) from error
    if digest != state["files"].get(name):
        raise _damaged(checkpoint, path, "the file that belongs to state.json", "another, or a damaged one")
    return tensors


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 of all that state.json says besides."""
    rest = {key: value for key, value in state.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _damaged(checkpoint: Path, path: Path, expected: str, got: str) -> CheckpointError:
    if not checkpoint.is_dir():
        return CheckpointError(
            f"{checkpoint}: expected a checkpoint, got none: it does not exist, or another process has removed it while"
            f" it was read; remedy: run the command again"
        )
    return CheckpointError(f"{path}: expected {expected}, got {got}; remedy: {_remedy(checkpoint)}")


def _remedy(checkpoint: Path) -> str:
    """What to do about a damaged one."""
    everything = found(checkpoint.parent)
    before = everything[everything.index(checkpoint) + 1 :] if checkpoint in everything else []
    then = f"the run continues from {before[0].name}" if before else "there is no earlier one, so the run starts again"
    return f"remove {checkpoint}; then {then}"


def _no_number(name: str) -> None:
    raise ValueError(f"{name}, which JSON does not know")


def _short(x: Any, most: int = 60) -> str:
    text = str(x)
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def _fill_model(checkpoint: Path, model: nn.Module, state: dict) -> None:
    path = checkpoint / _MODEL
    tensors = _tensors(checkpoint, _MODEL, state)
    present = model.state_dict()
    tensors |= {k: present[k] for k in getattr(model, "added_tensors", ()) if k not in tensors}
    wanted, got = ({k: _kind(v) for k, v in x.items()} for x in (present, tensors))
    for key in sorted(wanted.keys() | got.keys()):
        if wanted.get(key) != got.get(key):
            raise CheckpointError(
                f"{path}: {key}: expected {wanted.get(key, 'nothing')} as {type(model).__name__} has, got"
                f" {got.get(key, 'nothing')}; remedy: build the model with the run's own settings"
            )
    model.load_state_dict(tensors)


def _kind(x: torch.Tensor) -> str:
    return f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}"


def _folder(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step:09d}"


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that at no time half of one carries its name."""
    if os.path.lexists(folder):
        doomed = folder.with_name(f".{folder.name}.old")
        atomic_files.discard(doomed)
        os.rename(folder, doomed)
        atomic_files.discard(doomed)
