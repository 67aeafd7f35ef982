"""llama_decode in plain PyTorch: one or more new tokens of a Llama whose keys and values are cached."""

import math

import torch
import torch.nn.functional as F

from genai_fast.kernels.llama_decode.layout import FIRST, LAYER, matrices, require


def _rms_norm(x, weight, eps):
    return F.rms_norm(x, x.shape[-1:], weight if weight.numel() else None, eps)


def _linear(x, weight, bias):
    return F.linear(x, weight, bias if bias.numel() else None)


def _turned(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def llama_decode(cache, ids, length, weights, scales, cos, sin, heads, windows, softcap, eps, every=False):
    """logits [B, V] of each sample's last token, or [B, T, V] of every one.

    Keys and values of the tokens go to cache [L, 2, B, H_kv, T_max, D].

    x = embedding[id]; each layer x += o(attention(norm x)), x += down(silu(gate(norm x)) up(norm x)), queries and keys
    normalized by head, where there are such norms, and turned by their position; logits = head(norm x).
    """
    size = require(cache, ids, length, weights, scales, cos, sin, heads, windows)
    wide_dtype = cos.dtype
    wide = [w.to(wide_dtype) for w in weights]
    for k, scale in zip(matrices(size.layers), scales, strict=False):
        wide[k] = wide[k] * scale[:, None]
    end, head_dim, groups = length + ids.size(1), size.head_dim, heads // cache.size(3)
    place = torch.arange(length, end, device=ids.device)
    at = torch.arange(end, device=ids.device)
    cos, sin = cos[length:end], sin[length:end]
    x = wide[0][ids]
    for layer, held in enumerate(cache):
        first = len(FIRST) + layer * len(LAYER)
        of_layer = wide[first : first + len(LAYER)]
        norm, q, q_bias, k, k_bias, v, v_bias, q_norm, k_norm, o, o_bias, norm_2, *mlp = of_layer
        y = _rms_norm(x, norm, eps)
        q, k, v = (_linear(y, *pair).unflatten(2, (-1, head_dim)) for pair in ((q, q_bias), (k, k_bias), (v, v_bias)))
        q = _rms_norm(q, q_norm, eps) if q_norm.numel() else q
        k = _rms_norm(k, k_norm, eps) if k_norm.numel() else k
        q, k = (_turned(part.transpose(1, 2), cos, sin) for part in (q, k))
        held[0, :, :, length:end], held[1, :, :, length:end] = k, v.transpose(1, 2)
        keys, values = (held[i, :, :, :end].to(wide_dtype).repeat_interleave(groups, 1) for i in range(2))
        scores = q @ keys.transpose(-1, -2) / math.sqrt(head_dim)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        hidden = at > place[:, None]
        hidden = hidden | (at <= place[:, None] - windows[layer]) if windows[layer] else hidden
        attended = scores.masked_fill(hidden, -math.inf).softmax(-1) @ values
        x = x + _linear(attended.transpose(1, 2).flatten(2), o, o_bias)
        y = _rms_norm(x, norm_2, eps)
        gate, up = _linear(y, *mlp[:2]), _linear(y, *mlp[2:4])
        x = x + _linear(F.silu(gate) * up, *mlp[4:])
    return F.linear(_rms_norm(x if every else x[:, -1], wide[-2], eps), wide[-1])
