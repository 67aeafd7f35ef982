"""A GPT's step past its modules: each linear layer one launch of ops.decode_linear, with the norm before it."""

from __future__ import annotations

import torch
from torch import nn

from genai_fast import ops
from genai_fast.backends import choose, forced_backend
from genai_fast.fusion.chains import global_hooks, obstacle
from genai_fast.kernels.common.schema import FLOAT_DTYPES
from genai_fast.kernels.decode_linear.layout import MOST_ROWS
from genai_fast.layers import LayerNorm
from genai_fast.models import gpt

# What `next_logits` reads; a module of another class may compute anything.
_PARTS = {
    gpt.GPT, gpt._Block, gpt._Attention, gpt._MLP, LayerNorm, nn.Linear, nn.Embedding, nn.ModuleDict, nn.ModuleList
}  # fmt: skip


def serves(model: gpt.GPT, batch: int) -> bool:
    """Whether the kernel computes steps of so many rows of this model, and what its modules would."""
    weight = model.transformer.wte.weight
    if batch > MOST_ROWS or weight.dtype not in FLOAT_DTYPES or global_hooks():
        return False
    if choose("decode_linear", forced_backend(), weight.device.type, weight.dtype)[0] != "triton":
        return False
    alike = all(p.dtype is weight.dtype for p in model.parameters())
    return alike and all(type(module) in _PARTS and not obstacle(module) for module in model.modules())


def next_logits(model: gpt.GPT, ids: torch.Tensor, positions: torch.Tensor, attend: gpt.Attend) -> torch.Tensor:
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
