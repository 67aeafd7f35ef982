"""A Llama that keeps the keys and values of all tokens so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from genai_fast import ops
from genai_fast.backends import choose, forced_backend
from genai_fast.fusion.chains import global_hooks, obstacle
from genai_fast.kernels.llama_decode import layout
from genai_fast.layers import RMSNorm
from genai_fast.models.common.cached import CachedModel, Sizes, places
from genai_fast.models.common.generation import unrounded
from genai_fast.models.llama.model import _MLP, Attend, Llama, _Attention, _Block

# What LlamaDecoder computes; a module of another class may compute anything.
_PARTS = {_Block, _Attention, _MLP, RMSNorm, nn.Linear, nn.Embedding, nn.ModuleDict, nn.ModuleList}


def cached_decoder(model: Llama, batch: int, weights: str) -> CachedLlama | ops.LlamaDecoder:
    """See `generation.decoder_for`."""
    parameters = list(model.parameters())
    plain = all(p.is_cpu and p.dtype is torch.float32 for p in parameters) and _is_as_made(model)
    if plain and choose("llama_decode", forced_backend(), "cpu")[0] == "cpu":
        return ops.LlamaDecoder(
            model.state_dict(), model.cos, model.sin, model.heads, model.block, batch, weights, windows=model.windows,
            softcap=model.softcap, eps=model.model.norm.eps,
        )  # fmt: skip
    one = parameters[0]
    unrounded(weights, f"a Llama of {one.dtype} on {one.device} that modules decode (changed modules, no kernel)")
    return CachedLlama(model, batch)


def _is_as_made(model: Llama) -> bool:
    """Whether it has the modules that Llama makes, of its sizes, and calling them does nothing else."""
    methods = ("run", "forward", "scores")
    if any(getattr(type(model), name) is not getattr(Llama, name) for name in methods) or global_hooks():
        return False
    modules = [m for m in model.modules() if m is not model]
    if obstacle(model) or any(type(m) not in _PARTS or obstacle(m) for m in modules):
        return False
    norms, layers = [m for m in modules if isinstance(m, RMSNorm)], model.model.layers
    alike = len({m.eps for m in norms}) == 1 and not any(m.offset or m.casting_mode for m in norms)
    heads = {block.self_attn.head_dim for block in layers} == {model.head_dim} and len(layers) == len(model.windows)
    if not alike or not heads or any(getattr(m, "max_norm", None) for m in modules):
        return False
    width, d = model.width, model.head_dim
    size = layout.Sizes(model.vocabulary, width, model.heads * d, model.kv_heads * d, d, model.hidden, len(layers))
    expected = dict(zip(layout.names(len(layers)), layout.shapes(size), strict=True))
    state = model.state_dict()
    whole = all(name in state or name.endswith(layout.ABSENT) for name in expected)
    return whole and len(model.cos) >= model.block and all(expected.get(name) == w.shape for name, w in state.items())


class CachedLlama(CachedModel):
    """A Llama with the keys and values of all tokens so far; see CachedModel."""

    def __init__(self, model: Llama, batch: int) -> None:
        super().__init__(model, batch, Sizes(len(model.windows), model.kv_heads, model.block, model.head_dim))

    def _run(self, ids: torch.Tensor, lengths: torch.Tensor | None, attend: Attend) -> torch.Tensor:
        return self._model.run(ids, None if lengths is None else places(lengths, ids.size(1)), attend)

    def _scores(self, layer: int) -> dict[str, Any]:
        return self._model.scores(layer)
