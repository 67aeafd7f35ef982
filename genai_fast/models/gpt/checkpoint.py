"""GPT-2 checkpoints of the usual layouts, read and brought into one: our names, matrices [out, in]."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from genai_fast.errors import UsageError, require

_FILES = ("model.safetensors", "pytorch_model.bin")
_MASK = re.compile(r"\.attn\.(masked_)?bias$")
_WRAPPED = re.compile(r"((module|_orig_mod)\.)+")  # by DDP and torch.compile
_LAYER = re.compile(r"transformer\.h\.(\d+)\.")
_MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"


def read(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a file, or of the file in a folder, by name; nothing in it is executed."""
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in _FILES if (path / name).exists()), None)
        if found is None:
            raise UsageError(f"{path}: expected {' or '.join(_FILES)} in this folder, got neither")
        path = found
    if not path.exists():
        raise UsageError(f"{path}: expected a GPT-2 checkpoint, got no such file")
    if path.suffix == ".safetensors":
        package = require("safetensors", "train")
        try:
            return require("safetensors.torch", "train").load_file(path)
        except package.SafetensorError as error:
            raise UsageError(f"{path}: expected safetensors, got a file that cannot be read: {error}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UsageError(
            f"{path}: expected .safetensors, or a torch file that holds tensors and plain values alone, got another"
            f" ({str(error).splitlines()[0]}); remedy: save model.state_dict()"
        ) from error
    for key in ("model", "state_dict"):  # where trainers put it beside the optimizer's
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise UsageError(f"{path}: expected a state dict, got {type(found).__name__}; remedy: save model.state_dict()")
    return dict(found)


def converted(tensors: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors by our names, sizes as GPT takes them but for the heads)."""
    state: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name = key[_WRAPPED.match(key).end() :] if _WRAPPED.match(key) else key
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"load_gpt2: {key}: expected a tensor, got {type(value).__name__}")
        if name in state:
            raise ValueError(f"load_gpt2: {name}: expected one tensor of this name, got {key} too")
        if not _MASK.search(name):
            state[name] = value
    embedding, positions = (_matrix(state, f"transformer.{name}.weight") for name in ("wte", "wpe"))
    layers = {int(found[1]) for found in map(_LAYER.match, state) if found}
    width = embedding.size(1)
    sizes = {
        "vocabulary": len(embedding),
        "block": len(positions),
        "layers": max(layers, default=0) + 1,
        "width": width,
        "bias": "transformer.ln_f.bias" in state,
    }
    # c_proj [C, C] does not tell its orientation, so one matrix that does speaks for all.
    name = f"transformer.h.0.{_MATRICES[0]}"
    shape = tuple(_matrix(state, name).shape)
    if shape == (width, 3 * width):
        for key in state:
            if key.endswith(_MATRICES) and state[key].dim() == 2:
                state[key] = state[key].t()
    elif shape != (3 * width, width):
        raise ValueError(
            f"load_gpt2: {name}: expected [{3 * width}, {width}] (nn.Linear) or [{width}, {3 * width}] (Conv1D) beside"
            f" an embedding of {width} channels, got {list(shape)}"
        )
    head = state.setdefault(_HEAD, embedding)
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise ValueError(
            f"load_gpt2: {_HEAD}: expected {_EMBEDDING} again, as GPT-2 ties them, got others {list(head.shape)};"
            f" remedy: leave it out to go on with the embedding"
        )
    return state, sizes


def check(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """The same names and shapes."""
    for name, p in expected.items():
        if name not in state:
            raise ValueError(f"load_gpt2: {name}: expected a tensor {list(p.shape)}, got none")
        if state[name].shape != p.shape:
            raise ValueError(f"load_gpt2: {name}: expected shape {list(p.shape)}, got {list(state[name].shape)}")
    unexpected = sorted(state.keys() - expected.keys())
    if unexpected:
        raise ValueError(f"load_gpt2: {unexpected[0]}: expected no such tensor, got {len(unexpected)} of that kind")


def _matrix(state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in state or state[name].dim() != 2:
        got = list(state[name].shape) if name in state else "none"
        raise ValueError(f"load_gpt2: {name}: expected a matrix, got {got}; is this a GPT-2 checkpoint?")
    return state[name]
