"""gpt_decode in plain PyTorch: one or more new tokens of a GPT-2 whose keys and values are cached."""

import math

import torch
import torch.nn.functional as F

from genai_fast.kernels.gpt_decode.layout import FIRST, LAYER, matrices, require


def gpt_decode(cache, ids, length, weights, scales, eps, every=False):
    """logits [B, V] of each sample's last token, or [B, T, V] of every one.

    Keys and values of the tokens go to cache [L, 2, B, H, T_max, D].

    x = wte[id] + wpe[position]; each layer x += c_proj(attention(ln_1 x)), x += c_proj(gelu(c_fc(ln_2 x))), GELU by
    tanh; logits = lm_head(ln_f x). Keys of a token are those of all tokens up to itself.
    """
    size = require(cache, ids, length, weights, scales)
    wide = [w.to(cache.dtype) for w in weights]
    for k, scale in zip(matrices(size.layers), scales, strict=False):
        wide[k] = wide[k] * scale[:, None]
    (batch, tokens), (heads, head_dim) = ids.shape, (cache.size(3), cache.size(5))
    end = length + tokens
    place = torch.arange(length, end, device=ids.device)
    hidden = place[:, None] < torch.arange(end, device=ids.device)

    def norm(x, weight, bias):
        return F.layer_norm(x, (size.channels,), weight, bias, eps)

    x = wide[0][ids] + wide[1][place]
    for layer, held in enumerate(cache):
        first = len(FIRST) + layer * len(LAYER)
        ln_1, ln_1_bias, qkv, qkv_bias, proj, proj_bias, ln_2, ln_2_bias, fc, fc_bias, out, out_bias = wide[
            first : first + len(LAYER)
        ]
        q, k, v = F.linear(norm(x, ln_1, ln_1_bias), qkv, qkv_bias).view(batch, tokens, 3, heads, head_dim).unbind(2)
        held[0, :, :, length:end], held[1, :, :, length:end] = k.transpose(1, 2), v.transpose(1, 2)
        scores = q.transpose(1, 2) @ held[0, :, :, :end].transpose(-1, -2) / math.sqrt(head_dim)
        attended = scores.masked_fill(hidden, -math.inf).softmax(-1) @ held[1, :, :, :end]
        x = x + F.linear(attended.transpose(1, 2).reshape(batch, tokens, size.channels), proj, proj_bias)
        x = x + F.linear(F.gelu(F.linear(norm(x, ln_2, ln_2_bias), fc, fc_bias), approximate="tanh"), out, out_bias)
    return F.linear(norm(x if every else x[:, -1], *wide[-3:-1]), wide[-1])
