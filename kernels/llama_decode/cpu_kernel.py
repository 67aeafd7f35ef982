"""llama_decode on the CPU: one call of cpu_kernel.cpp for all layers."""

from array import array

import torch

from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import address
from genai_fast.kernels.llama_decode.layout import CACHE_DTYPES, MATRIX_DTYPES, require


def llama_decode(cache, ids, length, weights, scales, cos, sin, heads, windows, softcap, eps, every):
    size = require(cache, ids, length, weights, scales, cos, sin, heads, windows)
    (batch, tokens), (kv_heads, room) = ids.shape, cache.shape[3:5]
    ids = ids.contiguous()
    shape = (batch, tokens, size.vocabulary) if every else (batch, size.vocabulary)
    logits = torch.empty(shape, dtype=torch.float32, device="cpu")
    tensors = array("q", [address(w) if w.numel() else 0 for w in weights])
    factors, seen = array("q", [address(s) for s in scales]), array("q", windows)
    cpp.llama_decode(
        tensors.buffer_info()[0], factors.buffer_info()[0], seen.buffer_info()[0], address(cos), address(sin),
        address(cache), address(ids), address(logits), size.layers, batch, heads, kv_heads, size.head_dim,
        size.channels, size.hidden, size.vocabulary, room, tokens, length, softcap, eps,
        MATRIX_DTYPES.index(weights[0].dtype), CACHE_DTYPES.index(cache.dtype), int(every),
    )  # fmt: skip
    return logits
