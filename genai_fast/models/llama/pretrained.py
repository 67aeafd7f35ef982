"""Hugging Face's folders of Llama, Mistral, Qwen 2 and Qwen 3 as the beginning of a run, or as a model that writes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from genai_fast.data import hugging_face_files, llama_files
from genai_fast.data.hugging_face_files import found
from genai_fast.data.text import Tokenizer, hugging_face_tokenizer
from genai_fast.errors import UsageError
from genai_fast.models.llama.model import Llama

TYPES = llama_files.TYPES
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LEFT_OUT = "rotary_emb.inv_freq"  # a table, in older files

__all__ = ["TYPES", "found", "load", "made", "opened", "sized", "tokenizer", "written"]


def made(folder: Path, block: int | None = None) -> Llama:
    """The model of a folder, on the CPU in float32; see `Llama.from_pretrained`."""
    settings = llama_files.settings(folder)
    settings["block"] = min(block or settings["block"], settings["block"])
    with torch.device("meta"):
        model = Llama(**settings)
    model.to_empty(device="cpu")
    _fill(model, folder)
    return model


def tokenizer(folder: Path) -> Tokenizer:
    """See `recipe.Pretrained`."""
    return hugging_face_tokenizer.read(folder, llama_files.settings(folder)["vocabulary"])


def sized(folder: Path, settings: Any) -> Any:
    """The settings of a run that begins with it: the checkpoint's, and a block that it was made for."""
    own = llama_files.settings(folder)
    block = min(settings.block, own.pop("block"))
    del own["vocabulary"]
    return replace(settings, **own, block=block)


def load(folder: Path, model: Llama) -> str:
    """Put its weights into a model of its sizes. Returns what was done.

    Raises:
        UsageError: the files cannot be read, or hold another network than the model.
    """
    _fill(model, folder)
    return f"{folder}: all tensors taken, {model.block} positions"


def opened(folder: Path, settings: type[Any]) -> tuple[Any, Llama]:
    """(settings, model) of it.

    Raises:
        UsageError: the files cannot be read, or hold another network than Llama.
    """
    own = llama_files.settings(folder)
    names = {f.name for f in fields(settings)}
    return settings(**{name: value for name, value in own.items() if name in names}), made(folder)


def written(model: Llama) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(settings, tensors) as Hugging Face's folders have them.

    Raises:
        UsageError: none of the four kinds computes what the model does.
    """
    settings = llama_files.written(
        vocabulary=model.vocabulary, block=model.block, layers=len(model.windows), heads=model.heads, width=model.width,
        hidden=model.hidden, kv_heads=model.kv_heads, head_dim=model.head_dim, norm_eps=model.norm_eps,
        tied=_is_tied(model), bias=model.biases, qk_norm=model.model.layers[0].self_attn.qk_norm,
        rope_theta=model.rope_theta, rope_scaling=model.rope_scaling, windows=model.windows, softcap=model.softcap,
    )  # fmt: skip
    return settings, {name: p for name, p in model.state_dict().items() if name != _HEAD or not _is_tied(model)}


@torch.no_grad()
def _fill(model: Llama, folder: Path) -> None:
    """All of the model's tensors from the folder's files, one at a time."""
    state, taken = model.state_dict(), set()
    for path in hugging_face_files.shards(folder):
        for name, tensor in hugging_face_files.tensors(path):
            if name.endswith(_LEFT_OUT):
                continue
            where = state.get(name)
            if where is None or where.shape != tensor.shape:
                expected = "no such tensor" if where is None else f"shape {list(where.shape)}"
                raise UsageError(f"{path}: {name}: expected {expected}, got {list(tensor.shape)}")
            again = name in (_HEAD, _EMBEDDING) and _is_tied(model) and taken & {_HEAD, _EMBEDDING}
            if again and not torch.equal(where, tensor.to(where)):
                raise UsageError(f"{path}: {name}: expected {again.pop()} again, as config.json ties them, got others")
            where.copy_(tensor)
            taken.add(name)
    missing = sorted(state.keys() - taken - ({_HEAD} if _is_tied(model) else set()))
    if missing:
        raise UsageError(
            f"{folder}: {missing[0]}: expected a tensor {list(state[missing[0]].shape)}, got none; remedy: all files of"
            f" the checkpoint"
        )


def _is_tied(model: Llama) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight
