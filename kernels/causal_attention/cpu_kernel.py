"""causal_attention on the CPU: allocates results and calls cpu_kernel.cpp."""

import torch

from genai_fast.kernels.causal_attention.layout import empty_alike, require_heads, require_lengths, require_rows
from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.philox import scale as grown
from genai_fast.kernels.common.philox import threshold
from genai_fast.kernels.common.recorder import Numbers
from genai_fast.kernels.common.rows import DTYPE_CODE, address


def _arguments(q, k, starts_q, starts_k, seed, scale, window, softcap, causal, share, offset):
    """What both kernels take after their tensors."""
    limit = threshold(share) if seed is not None else 0  # a share that rounds to no word drops nothing
    draw = (address(seed), offset, limit - 1, grown(share)) if limit else (0, 0, 0, 1.0)
    packed = (address(starts_q), address(starts_k))
    sequences = q.size(0) if starts_q is None else starts_q.numel() - 1
    sizes = (sequences, q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), DTYPE_CODE[q.dtype])
    return *packed, *sizes, scale, softcap, window, causal, *draw


def _strides(tensors):
    return Numbers(s for x in tensors for s in x.stride()[:3])


def _call(name, tensors, more, arguments):
    getattr(cpp, name)(*(address(x) for x in tensors), _strides(tensors), *more, *arguments)


def causal_attention(q, k, v, starts_q, starts_k, most_q, most_k, seed, scale, window, softcap, causal, share, offset):
    q, k, v, starts_q, starts_k = require_heads(q, k, v, starts_q, starts_k, seed)
    out = empty_alike(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device="cpu")
    arguments = _arguments(q, k, starts_q, starts_k, seed, scale, window, softcap, causal, share, offset)
    _call("causal_attention", (q, k, v, out), (address(lse),), arguments)
    return out, lse


def decode_attention(q, k_cache, v_cache, lengths, k, v, scale, window, softcap):
    q, k_cache, v_cache, _, _ = require_heads(q, k_cache, v_cache, None, None, None, in_place=True)
    if k is not None:
        _, k, v, _, _ = require_heads(q, k, v, None, None, None)
    require_lengths(q, k_cache, lengths, k)
    out = empty_alike(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device="cpu")
    if lengths.dtype is not torch.int32:
        lengths = lengths.clamp(-1, k_cache.size(2) + 1).to(torch.int32)
    lengths = lengths.contiguous()
    held = torch.empty(q.size(0), dtype=torch.int32, device="cpu")
    tensors = (q, k_cache, v_cache, out) if k is None else (q, k_cache, v_cache, out, k, v)
    cpp.decode_attention(
        *(address(x) for x in tensors[:4]), address(k), address(v), _strides(tensors), address(lse),
        address(lengths), address(held), q.size(0), q.size(1), k_cache.size(1), q.size(2), k_cache.size(2), q.size(3),
        DTYPE_CODE[q.dtype], scale, softcap, window
    )  # fmt: skip
    return out, lse


def causal_attention_backward(
    grad_out, grad_lse, q, k, v, out, lse, starts_q, starts_k, most_q, most_k, seed, scale, window, softcap, causal,
    share, offset,
):  # fmt: skip
    q, k, v, starts_q, starts_k = require_heads(q, k, v, starts_q, starts_k, seed)
    grad_out, out, lse, grad_lse = require_rows(q, grad_out, out, lse, grad_lse)
    gradients = tuple(empty_alike(x) for x in (q, k, v))
    arguments = _arguments(q, k, starts_q, starts_k, seed, scale, window, softcap, causal, share, offset)
    more = (address(lse), address(grad_lse))
    _call("causal_attention_backward", (q, k, v, out, grad_out, *gradients), more, arguments)
    return gradients
