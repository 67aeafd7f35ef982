"""GPT-2 checkpoints of the usual layouts brought into one: our names, matrices [out, in]."""

import re
from collections.abc import Mapping
from typing import Any

import torch

_MASK = re.compile(r"\.attn\.(masked_)?bias$")
_WRAPPED = re.compile(r"((module|_orig_mod)\.)+")  # by DDP and torch.compile
_LAYER = re.compile(r"transformer\.h\.(\d{1,9})\.")
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"


def converted(tensors: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors by our names, sizes as GPT takes them but for the heads)."""
    state: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        if not isinstance(key, str):
            raise ValueError(f"load_gpt2: expected names of tensors, got a key of {type(key).__name__}")
        name = key[_WRAPPED.match(key).end() :] if _WRAPPED.match(key) else key
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"load_gpt2: {key}: expected a tensor, got {type(value).__name__}")
        if not _is_plain(value):
            raise ValueError(f"load_gpt2: {key}: expected a dense tensor with memory of its own, got another kind")
        if name in state:
            raise ValueError(f"load_gpt2: {name}: expected one tensor of this name, got {key} too")
        if not _MASK.search(name):
            state[name] = value
    embedding, positions = (_matrix(state, f"transformer.{name}.weight") for name in ("wte", "wpe"))
    layers = {int(found[1]) for found in map(_LAYER.match, state) if found}
    width, missing = embedding.size(1), set(range(len(layers))) - layers
    if missing:
        raise ValueError(f"load_gpt2: transformer.h.{min(missing)}: expected all layers up to {max(layers)}, got none")
    sizes = {"vocabulary": len(embedding), "block": len(positions), "layers": max(len(layers), 1), "width": width}
    sizes["bias"] = "transformer.ln_f.bias" in state
    # c_proj [C, C] does not tell its orientation, so one matrix that does speaks for all.
    name = f"transformer.h.0.{MATRICES[0]}"
    shape = tuple(_matrix(state, name).shape)
    if shape == (width, 3 * width):
        for key in state:
            if key.endswith(MATRICES) and state[key].dim() == 2:
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


def _is_plain(x: torch.Tensor) -> bool:
    """Whether each element has its own memory, so that what a file says of sizes it also holds."""
    if x.layout is not torch.strided or x.is_meta or x.is_quantized or x.is_nested:
        return False
    return x.untyped_storage().nbytes() >= x.numel() * x.element_size()


def _matrix(state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in state or state[name].dim() != 2:
        got = list(state[name].shape) if name in state else "none"
        raise ValueError(f"load_gpt2: {name}: expected a matrix, got {got}; is this a GPT-2 checkpoint?")
    return state[name]
