"""What commands ask of their arguments: a run that can do something, seeds, names of files."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from genai_fast.contract import offers
from genai_fast.errors import UsageError
from genai_fast.runs.run import Opened, open_run


def opened(options: argparse.Namespace, need: str = "", *protocols: type) -> Opened:
    """A run by its folder, or its name under runs, whose model offers what `need` does, by one of the protocols."""
    folder = Path(options.folder)
    if not folder.exists() and (Path("runs") / folder).exists():
        folder = Path("runs") / folder
    run = open_run(folder, options.best)
    if need and (run.tokenizer is not None or not any(offers(run.model, protocol) for protocol in protocols)):
        raise UsageError(f"{folder}: expected a run of a model that can {need}, got one of {run.recipe}")
    return run


def at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{flag}: expected at least {least}, got {value}")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed: expected 0 to 2**63 - 1, got {seed}")


def free_path(out: Path | None, default: str) -> Path:
    """Where to write: `out`, or the default name, with a number if there is such a file already."""
    path, number = out or Path(default), 1
    while out is None and path.exists():
        number += 1
        path = Path(default).with_stem(f"{Path(default).stem}-{number}")
    return path


def replaced_note(path: Path) -> str:
    """What a message adds about a file that is about to be written over."""
    return " (replaces the former file)" if path.is_file() else ""


def check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"--out: expected a file in an existing folder, got {path}")


def check_png(path: Path) -> None:
    check_parent(path)
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out: expected the name of a PNG file, got {path}")


def labels_of(run: Opened, name: str | None, count: int) -> torch.Tensor | None:
    """[count] labels of a class by its name; None: as the model chooses."""
    if name is None:
        return None
    if not run.classes:
        raise UsageError(f"--class: expected a run of a conditional model, got one of {run.recipe}; remedy: omit it")
    if name not in run.classes:
        raise UsageError(f"--class: expected one of {', '.join(run.classes)}, got {name}")
    return torch.full((count,), run.classes.index(name))
