"""Folders of Hugging Face's GPT-2 files as the beginning of a run, or as a model that writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from genai_fast.data import gpt2_files
from genai_fast.errors import UsageError
from genai_fast.models.gpt.model import GPT, load_gpt2

_SIZES = ("layers", "heads", "width")


def found(path: Path) -> Path | None:
    """The folder of such files that a path names, itself or by its weights; None if it names something else."""
    folder = path if path.is_dir() else path.parent
    named = path.is_dir() or path.name in gpt2_files.WEIGHTS
    whole = (folder / gpt2_files.CONFIG).is_file() and any((folder / name).is_file() for name in gpt2_files.WEIGHTS)
    return folder if named and whole else None


def sized(folder: Path, settings: Any) -> Any:
    """The settings of a run that begins with it: the checkpoint's sizes, and a block that it has positions for."""
    sizes = gpt2_files.sizes(folder)
    own = {name: sizes[name] for name in _SIZES}
    return replace(settings, **own, block=min(settings.block, sizes["block"]))


def load(folder: Path, model: GPT) -> str:
    """Put its weights into a model of its sizes; positions past the model's block are left out. Returns what was done.

    Raises:
        UsageError: the files cannot be read, or hold another network than the model.
    """
    tensors, _ = gpt2_files.read(folder, model.heads)
    cut: Mapping[str, Any] = {
        name: tensor[: model.block] if str(name).endswith("wpe.weight") else tensor for name, tensor in tensors.items()
    }
    try:
        load_gpt2(model, cut)
    except ValueError as error:
        raise UsageError(f"{folder}: {error}") from error
    return f"{folder}: all tensors taken, {model.block} positions"


def opened(folder: Path, settings: type[Any]) -> tuple[Any, GPT]:
    """(settings, model) of it.

    Raises:
        UsageError: the files cannot be read, or hold another network than GPT.
    """
    try:
        model = GPT.from_gpt2(folder)
    except ValueError as error:
        raise UsageError(f"{folder}: {error}") from error
    return settings(**gpt2_files.sizes(folder)), model
