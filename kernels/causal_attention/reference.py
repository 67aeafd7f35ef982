"""causal_attention in plain PyTorch: the definition, the fallback and the second derivatives.

Query i of T_q stands at position i + T_k - T_q among the keys (both end together: "bottom right"), in each sequence by
itself where `starts_q` and `starts_k` cut packed ones apart. Word (row, j) of dropout is the one at position
(offset + row) * pitch + j of the seed's stream (common/philox.py), row = (b H + h) T_q + i, pitch = T_k rounded up
to a multiple of 4.
"""

import math

import torch

from genai_fast.kernels.causal_attention.layout import alike
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
    """Which keys each query sees, bool [T_q, T_k]. `window`: at most this many positions back (0: any)."""
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


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float):
    """Scores before anything is hidden, and their derivative by the scaled products."""
    product = (_wide(q) @ _groups(_wide(k), q.size(1)).transpose(-1, -2)) * scale
    if not softcap:
        return product, 1.0
    capped = torch.tanh(product / softcap)
    return softcap * capped, 1.0 - capped * capped


def _softmax(score: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, lse) over the keys that are seen; 0 and -inf for rows that see none."""
    score = score.masked_fill(~seen, -math.inf)
    most = score.detach().amax(-1, keepdim=True) if score.size(-1) else score.new_zeros((*score.shape[:-1], 1))
    most = torch.where(most == -math.inf, 0.0, most)
    weight = torch.exp(score - most)
    total = weight.sum(-1, keepdim=True)
    lse = (most + torch.log(total)).squeeze(-1)
    # A row of NaN stays one of its own keys.
    return (weight / torch.where(total == 0.0, 1.0, total)).masked_fill(~seen, 0.0), lse


def _probabilities(q, k, starts_q, starts_k, scale, window, softcap, causal):
    """(probabilities, lse, derivative of the scores by the scaled products, which keys are seen)."""
    score, slope = _scores(q, k, scale, softcap)
    seen = visible(q, k, starts_q, starts_k, causal, window)
    return *_softmax(score, seen), slope, seen


def _kept(p: torch.Tensor, seed: torch.Tensor | None, share: float, offset: int) -> torch.Tensor | float:
    """What dropout multiplies each probability by."""
    if seed is None:
        return 1.0
    rows, width = p.numel() // max(p.size(-1), 1), pitch(p.size(-1))
    words = philox.words(rows * width, seed, offset * width).view(*p.shape[:-1], width)[..., : p.size(-1)]
    return (words >= philox.threshold(share)).to(p.dtype) * philox.scale(share)


def causal_attention(q, k, v, starts_q, starts_k, most_q, most_k, seed, scale, window, softcap, causal, share, offset):
    """out = softmax(cap(scale q k^T)) v over the keys that a query sees; lse = ln sum e^score, float32 [B, H, T_q]."""
    p, lse, _, _ = _probabilities(q, k, starts_q, starts_k, scale, window, softcap, causal)
    out = (p * _kept(p, seed, share, offset)) @ _groups(_wide(v), q.size(1))
    return alike(out.to(q.dtype), q), lse


def _sum_groups(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(1, (heads, -1)).sum(2)


def causal_attention_backward(
    grad_out, grad_lse, q, k, v, out, lse, starts_q, starts_k, most_q, most_k, seed, scale, window, softcap, causal,
    share, offset,
):  # fmt: skip
    """dV = (keep P)^T dO; dS = P (keep dO V^T - rowsum(dO O) + d lse); dQ = dS K, dK = dS^T Q."""
    p, _, slope, seen = _probabilities(q, k, starts_q, starts_k, scale, window, softcap, causal)
    keep = _kept(p, seed, share, offset)
    heads = k.size(1)
    wide_k, wide_v, grad = _groups(_wide(k), q.size(1)), _groups(_wide(v), q.size(1)), _wide(grad_out)
    grad_p = (grad @ wide_v.transpose(-1, -2)) * keep
    delta = (grad_p * p).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - _wide(grad_lse).unsqueeze(-1)
    grad_product = (p * (grad_p - delta) * (slope * scale)).masked_fill(~seen, 0.0)
    grad_q = grad_product @ wide_k
    grad_k = _sum_groups(grad_product.transpose(-1, -2) @ _wide(q), heads)
    grad_v = _sum_groups((p * keep).transpose(-1, -2) @ grad, heads)
    return alike(grad_q.to(q.dtype), q), alike(grad_k.to(q.dtype), k), alike(grad_v.to(q.dtype), v)


def decode_attention(q, k_cache, v_cache, lengths, k, v, scale, window, softcap):
    """Writes k and v behind the first `lengths` tokens of each sample's cache, then attends over all of them.

    A sample whose cache is too short for them is left as it was, and gives NaN.
    """
    added, room = 0 if k is None else k.size(2), k_cache.size(2)
    lengths = lengths.to(torch.int64)
    fits = (lengths >= 0) & (lengths + added <= room)
    if added:
        place = lengths[:, None] + torch.arange(added, device=q.device)
        place = torch.where(fits[:, None], place, 0)
        sample = torch.arange(q.size(0), device=q.device)[:, None]
        for cache, new in ((k_cache, k), (v_cache, v)):
            old = cache[sample, :, place]  # [B, T, H_kv, D]
            cache[sample, :, place] = torch.where(fits[:, None, None, None], new.transpose(1, 2).to(cache.dtype), old)
    last = torch.where(fits, lengths + added, 0)
    position = last[:, None] - q.size(2) + torch.arange(q.size(2), device=q.device)  # of each query
    back = position[:, :, None] - torch.arange(room, device=q.device)
    seen = (back >= 0) & ((back < window) if window else True)
    score, _ = _scores(q, k_cache, scale, softcap)
    p, lse = _softmax(score, seen[:, None])
    values = _groups(_wide(v_cache), q.size(1))
    unused = ~(torch.arange(room, device=q.device) < last[:, None])  # whatever lies there
    out = p @ values.masked_fill(unused[:, None, :, None], 0.0)
    wrong = ~fits[:, None, None]
    out, lse = out.masked_fill(wrong.unsqueeze(-1), math.nan), lse.masked_fill(wrong, math.nan)
    return alike(out.to(q.dtype), q), lse
