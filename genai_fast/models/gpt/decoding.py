"""A GPT that keeps the keys and values of all tokens so far, and its step past its modules.

That step makes each linear layer one launch of ops.decode_linear, with the norm before it.
"""

from __future__ import annotations

import torch
from torch import nn

from genai_fast import ops
from genai_fast.backends import choose, forced_backend
from genai_fast.fusion.chains import global_hooks, obstacle
from genai_fast.kernels.common.schema import FLOAT_DTYPES
from genai_fast.kernels.decode_linear.layout import MOST_ROWS
from genai_fast.kernels.gpt_decode import layout
from genai_fast.layers import LayerNorm
from genai_fast.models.common.cached import CachedModel, Sizes, Step, places
from genai_fast.models.common.generation import unrounded
from genai_fast.models.common.submodules import first_rows
from genai_fast.models.gpt.model import _MLP, GPT, Attend, _Attention, _Block

# What `next_logits` reads; a module of another class may compute anything.
_PARTS = {GPT, _Block, _Attention, _MLP, LayerNorm, nn.Linear, nn.Embedding, nn.ModuleDict, nn.ModuleList}


def serves(model: GPT, batch: int) -> bool:
    """Whether the kernel computes steps of this many rows of this model, and what its modules would."""
    weight = next(model.parameters())
    if batch > MOST_ROWS or weight.dtype not in FLOAT_DTYPES or not _is_as_made(model):
        return False
    if choose("decode_linear", forced_backend(), weight.device.type, weight.dtype)[0] != "triton":
        return False
    return all(p.dtype is weight.dtype for p in model.parameters())


def _is_as_made(model: GPT) -> bool:
    """Whether it has the modules that GPT makes, of its sizes, and calling them does nothing else."""
    if (type(model).run, type(model).forward) != (GPT.run, GPT.forward) or global_hooks():
        return False
    modules = [m for m in model.modules() if m is not model]
    if obstacle(model) or any(type(m) not in _PARTS or obstacle(m) for m in modules):
        return False
    settings = {m.eps for m in modules if isinstance(m, LayerNorm)}, {b.attn.heads for b in model.transformer.h}
    if any(len(found) > 1 for found in settings) or any(getattr(m, "max_norm", None) for m in modules):
        return False
    layers, positions = len(model.transformer.h), len(model.transformer.wpe.weight)
    size = layout.Sizes(model.vocabulary, model.width, positions, layers, 4 * model.width)
    expected = dict(zip(layout.names(layers), layout.shapes(size), strict=True))
    state = model.state_dict()
    whole = all(name in state or name.endswith(".bias") for name in expected)
    return whole and positions >= model.block and all(expected.get(name) == w.shape for name, w in state.items())


def next_logits(model: GPT, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
    """Ids [B] at positions [B] -> logits [B, V] of the next token; `attend` as GPT.run takes it."""
    parts = model.transformer
    h = parts.wte(ids) + parts.wpe(positions)
    for layer, block in enumerate(parts.h):
        # [B, 3 C] -> three of [B, H, 1, D]
        qkv = _normed(h, block.ln_1, block.attn.c_attn).unflatten(1, (3, block.attn.heads, 1, -1))
        y = attend(layer, *qkv.unbind(1)).flatten(1)
        h = ops.decode_linear(y, block.attn.c_proj.weight, block.attn.c_proj.bias, residual=h)
        y = _normed(h, block.ln_2, block.mlp.c_fc, "gelu_tanh")
        h = ops.decode_linear(y, block.mlp.c_proj.weight, block.mlp.c_proj.bias, residual=h)
    return _normed(h, parts.ln_f, model.lm_head)


def _normed(x: torch.Tensor, norm: LayerNorm, linear: nn.Linear, activation: str = "none") -> torch.Tensor:
    return ops.decode_linear(
        x, linear.weight, linear.bias, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, activation=activation
    )


def cached_decoder(model: GPT, batch: int, weights: str) -> CachedGPT | ops.GPTDecoder:
    """See `generation.decoder_for`."""
    parameters = list(model.parameters())
    plain = all(p.is_cpu and p.dtype is torch.float32 for p in parameters) and _is_as_made(model)
    if plain and choose("gpt_decode", forced_backend(), "cpu")[0] == "cpu":
        eps = model.transformer.ln_f.eps
        return ops.GPTDecoder(model.state_dict(), model.heads, model.block, batch, weights, eps=eps)
    one = parameters[0]
    unrounded(weights, f"a GPT of {one.dtype} on {one.device} that modules decode (changed modules, no kernel)")
    return CachedGPT(model, batch)


class CachedGPT(CachedModel):
    """A GPT with the keys and values of all tokens so far; on CUDA a step is one captured graph.

    Weights may change between the calls, but on CUDA only in place.

    Attributes:
        path: as of CachedModel; the other way is "kernels", by `ops.decode_linear`, on CUDA alone, for up to 16 rows of
            a model whose modules are as GPT made them.
    """

    def __init__(self, model: GPT, batch: int) -> None:
        sizes = Sizes(len(model.transformer.h), model.heads, model.block, model.width // model.heads)
        super().__init__(model, batch, sizes)

    def _run(self, ids: torch.Tensor, lengths: torch.Tensor | None, attend: Attend) -> torch.Tensor:
        embedding = self._model.transformer.wpe
        count = ids.size(1)
        positions = first_rows(embedding, count, ids.device) if lengths is None else embedding(places(lengths, count))
        return self._model.run(ids, positions, attend)

    def _ways(self) -> dict[str, Step]:
        served = serves(self._model, self._batch)
        return super()._ways() | ({"kernels": self._by_kernels} if served else {})

    def _by_kernels(self, ids: torch.Tensor) -> torch.Tensor:
        logits = next_logits(self._model, ids, self._lengths, self._attend)
        self._lengths += 1
        return logits
