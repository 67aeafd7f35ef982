"""gpt_decode on the CPU: one call of cpu_kernel.cpp for all layers."""

from array import array

import torch

from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import address
from genai_fast.kernels.gpt_decode.layout import MATRIX_DTYPES, require


def gpt_decode(cache, ids, length, weights, scales, eps, every):
    size = require(cache, ids, length, weights, scales)
    (batch, tokens), (heads, room) = ids.shape, cache.shape[3:5]
    ids = ids.contiguous()
    shape = (batch, tokens, size.vocabulary) if every else (batch, size.vocabulary)
    logits = torch.empty(shape, dtype=torch.float32, device="cpu")
    tensors, factors = array("q", [address(w) for w in weights]), array("q", [address(s) for s in scales])
    cpp.gpt_decode(
        tensors.buffer_info()[0], factors.buffer_info()[0], address(cache), address(ids), address(logits),
        size.layers, batch, heads, size.channels, size.hidden, size.vocabulary, room, tokens, length, eps,
        MATRIX_DTYPES.index(weights[0].dtype), int(every),
    )  # fmt: skip
    return logits
