"""Folders of Hugging Face's GPT-2 files as the beginning of a run, or as a model that writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from genai_fast.data import gpt2_files
from genai_fast.data.hugging_face_files import found
from genai_fast.data.text import Tokenizer, gpt2_tokenizer, hugging_face_tokenizer, read_tokenizer
from genai_fast.errors import UsageError
from genai_fast.models.gpt import checkpoint
from genai_fast.models.gpt.model import GPT, load_gpt2

TYPES = ("gpt2",)
_SIZES = ("layers", "heads", "width")

__all__ = ["TYPES", "found", "load", "opened", "sized", "tokenizer", "written"]


def tokenizer(folder: Path) -> Tokenizer:
    """See `recipe.Pretrained`: GPT-2's own, or another one by package tokenizers."""
    path = folder / hugging_face_tokenizer.FILE
    if path.exists() and not gpt2_tokenizer.is_gpt2s(path):
        return hugging_face_tokenizer.read(folder, gpt2_files.sizes(folder)["vocabulary"])
    return read_tokenizer(folder)


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
    sizes = gpt2_files.sizes(folder)
    return settings(**{name: sizes[name] for name in (*_SIZES, "block")}), model


def written(model: GPT) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(settings, tensors) as Hugging Face's folders have them; a model without biases gets zeros.

    Raises:
        UsageError: the model computes something that theirs does not.
    """
    layers, size = len(model.transformer.h), model.transformer.wte.weight.size(0)
    norm = model.transformer.ln_f
    if model.lm_head.weight is not model.transformer.wte.weight:
        raise UsageError("--format hf: expected a GPT whose head is tied to the embedding, got another head")
    settings = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": size, "n_positions": model.block,
        "n_embd": model.width, "n_layer": layers, "n_head": model.heads, "activation_function": "gelu_new",
        "layer_norm_epsilon": norm.eps, "tie_word_embeddings": True,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), model.dropout),
    }  # fmt: skip
    tensors = {}
    for name, p in model.state_dict().items():
        if name != "lm_head.weight":
            tensors[name] = p.t() if name.endswith(checkpoint.MATRICES) else p
    if norm.bias is None:
        for name, p in [*tensors.items()]:
            if ".wte." not in name and ".wpe." not in name:
                tensors[name.removesuffix("weight") + "bias"] = torch.zeros(p.size(-1))
    return settings, tensors
