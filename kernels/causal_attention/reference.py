"""causal_attention in plain PyTorch: the definition, the fallback and the second derivatives.

Query i of T_q stands at position i + T_k - T_q among the keys (both end together: "bottom right"), in each sequence by
itself where `starts_q` and `starts_k` cut packed ones apart. Word (row, j) of dropout is the one at position
(offset + row) * pitch + j of the seed's stream (common/philox.py), row = (b H + h) T_q + i, pitch = T_k rounded up
to a multiple of 4.
"""

from __future__ import annotations

import math

import torch

from genai_fast.kernels.causal_attention.layout import heads_inside
from genai_fast.kernels.common import philox


def pitch(keys: int) -> int:
    """Words a row of dropout."""
    return -(-keys // 4) * 4


def positions(starts: torch.Tensor | None, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each of `count` rows: its sequence, and how many rows of the sequence follow, this one included."""
    row = torch.arange(count, device=device)
    if starts is None:
        return torch.zeros_like(row), count - row
    sequence = torch.searchsorted(starts, row.to(starts.dtype), right=True) - 1
    return sequence, starts[1:].to(row.dtype)[sequence] - row


def visible(q: torch.Tensor, k: torch.Tensor, starts_q, starts_k, causal: bool, window: int) -> torch.Tensor:
    """Which keys each query sees, bool [T_q, T_k]. `window`: at most so many positions back (0: any)."""
    sequence_q, left_q = positions(starts_q, q.size(2), q.device)
    sequence_k, left_k = positions(starts_k, k.size(2), k.device)
    seen = sequence_q[:, None] == sequence_k[None, :]
    back = left_k[None, :] - left_q[:, None]  # how far the key lies behind the query
    if causal:
        seen = seen & (back >= 0)
    if window:
        seen = seen & (back < window) & (back > -window)
    return seen


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _groups(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Each key head once for every query head that reads it."""
    return x.repeat_interleave(heads // x.size(1), 1) if x.size(1) != heads else x


def _probabilities(q, k, starts_q, starts_k, scale, window, softcap, causal):
    """Scores before the cap's derivative is lost: (probabilities, lse, d score / d product)."""
    product = (_wide(q) @ _groups(_wide(k), q.size(1)).transpose(-1, -2)) * scale
    slope = 1.0
    if softcap:
        capped = torch.tanh(product / softcap)
        product, slope = softcap * capped, 1.0 - capped * capped
    score = product.masked_fill(~visible(q, k, starts_q, starts_k, causal, window), -math.inf)
    most = score.detach().amax(-1, keepdim=True) if score.size(-1) else score.new_zeros((*score.shape[:-1], 1))
    most = torch.where(most == -math.inf, 0.0, most)  # of a row that sees nothing
    weight = torch.exp(score - most)
    total = weight.sum(-1, keepdim=True)
    lse = (most + torch.log(total)).squeeze(-1)
    return weight / torch.where(total == 0.0, 1.0, total), lse, slope


def _kept(p: torch.Tensor, seed: torch.Tensor | None, share: float, offset: int) -> torch.Tensor | float:
    """What dropout multiplies each probability by."""
    if seed is None:
        return 1.0
    rows, width = p.numel() // max(p.size(-1), 1), pitch(p.size(-1))
    words = philox.words(rows * width, seed, offset * width).view(*p.shape[:-1], width)[..., : p.size(-1)]
    return (words >= philox.threshold(share)).to(p.dtype) * philox.scale(share)


def causal_attention(
    q, k, v, starts_q, starts_k, most_q, most_k, seed, scale, window, softcap, causal, share, offset
):  # fmt: skip
    """out = softmax(cap(scale q k^T)) v over the keys that a query sees; lse = ln sum e^score, float32 [B, H, T_q]."""
    p, lse, _ = _probabilities(q, k, starts_q, starts_k, scale, window, softcap, causal)
    out = (p * _kept(p, seed, share, offset)) @ _groups(_wide(v), q.size(1))
    return heads_inside(out.to(q.dtype)), lse


def _sum_groups(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(1, (heads, -1)).sum(2)


def causal_attention_backward(
    grad_out, grad_lse, q, k, v, out, lse, starts_q, starts_k, most_q, most_k, seed, scale, window, softcap, causal,
    share, offset,
):  # fmt: skip
    """dV = (keep P)^T dO; dS = P (keep dO V^T - rowsum(dO O) + d lse); dQ = dS K, dK = dS^T Q."""
    p, _, slope = _probabilities(q, k, starts_q, starts_k, scale, window, softcap, causal)
    keep = _kept(p, seed, share, offset)
    heads = k.size(1)
    wide_k, wide_v, grad = _groups(_wide(k), q.size(1)), _groups(_wide(v), q.size(1)), _wide(grad_out)
    grad_p = (grad @ wide_v.transpose(-1, -2)) * keep
    delta = (grad_p * p).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - _wide(grad_lse).unsqueeze(-1)
    grad_product = p * (grad_p - delta) * (slope * scale)
    grad_q = grad_product @ wide_k
    grad_k = _sum_groups(grad_product.transpose(-1, -2) @ _wide(q), heads)
    grad_v = _sum_groups((p * keep).transpose(-1, -2) @ grad, heads)
    return tuple(heads_inside(g.to(q.dtype)) for g in (grad_q, grad_k, grad_v))
