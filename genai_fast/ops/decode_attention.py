"""Attention of a few new tokens over a cache of keys and values, for generating text."""

from typing import Any

import torch

from genai_fast.backends import forced_backend
from genai_fast.ops import checks
from genai_fast.ops.causal_attention import check_heads, scores_settings
from genai_fast.ops.dispatch import library_call, observed, readable
from genai_fast.ops.memory import overlap, overlaps_itself
from genai_fast.ops.planned import planned_with, unrecorded

_OP = "decode_attention"


def _check_values(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cache_seqlens: torch.Tensor, k: Any = None, *_: Any,
    **__: Any,
) -> None:  # fmt: skip
    """What may change from call to call: where the caches lie, and how much they hold."""
    if k is not None and not observed() and overlap(k_cache, v_cache):
        raise ValueError(
            f"{_OP}: v_cache: expected other memory than k_cache has, got overlapping views; call .clone()"
        )
    if not readable(cache_seqlens):
        return
    room, added = k_cache.size(2), 0 if k is None else q.size(2)
    values = cache_seqlens.tolist()
    if min(values) < 0 or max(values) + added > room:
        raise ValueError(
            f"{_OP}: cache_seqlens: expected 0 to {room - added}, so that {added} new tokens fit into a cache of"
            f" {room}, got {min(values) if min(values) < 0 else max(values)}"
        )


@planned_with(_check_values)
def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Appends k and v to each sample's cache, then out = softmax(scale q k^T) v over what its cache holds.

    The T queries are the last T tokens of their sample, and see no token after their own: with all tokens decoded
    one by one, or some at a time, the results are those of causal_attention at once.

    Args:
        q: [B, H, T, D], float32, bfloat16, float16 or float64; T is small, D at most 256; the last stride is 1.
        k_cache, v_cache: [B, H_kv, T_max, D] of q's dtype, updated in place; H_kv divides H.
        cache_seqlens: int32 [B], on q's device: tokens in each sample's cache before this call. It stays as it is.
        k, v: [B, H_kv, T, D]: keys and values of the new tokens, stored after the first cache_seqlens. None: the
            cache holds them already, and cache_seqlens counts them.
        scale, window, softcap, return_lse: as in causal_attention.

    Returns: out [B, H, T, D] of q's dtype, in q's order of memory; with return_lse (out, lse), lse float32 [B, H, T].
    Gradients: none; tensors that require one are refused unless gradients are off (torch.no_grad()).
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64).
    Raises: TypeError, ValueError on arguments that do not fit, before anything is changed. A cache without room for
        the new tokens is found on the CPU; on CUDA, where looking would wait for the device, and in compiled regions
        that sample's cache stays as it is and its results are NaN.
    Source: Dao et al. 2023, Flash-Decoding for long-context inference; Pope et al. 2022, arXiv:2211.05102.
    """
    check_heads(_OP, q, k_cache, v_cache, "k_cache", "v_cache")
    if (k is None) != (v is None):
        missing = "k" if k is None else "v"
        raise ValueError(f"{_OP}: {missing}: expected k and v together, got None; give both or neither")
    expected = (q.size(0), k_cache.size(1), q.size(2), q.size(3))
    new = () if k is None or v is None else (("k", k), ("v", v))
    for name, x in new:
        checks.is_floating(_OP, name, x)
        checks.same_device(_OP, name, x, "q", q)
        if tuple(x.shape) != expected:
            raise ValueError(f"{_OP}: {name}: expected shape {expected}, one row for each query, got {tuple(x.shape)}")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache), *new):
        checks.same_dtype(_OP, name, x, "q", q)
    checks.needs_no_gradient(_OP, "q", (q, k_cache, v_cache, k, v))
    if new and not observed():
        _check_memory(k_cache, v_cache)
    _check_lengths(cache_seqlens, q)
    unrecorded(_check_values, q, k_cache, v_cache, cache_seqlens, k)
    settings = scores_settings(_OP, q, scale, window, softcap)
    with torch.no_grad():
        out, lse = library_call(_OP, q, k_cache, v_cache, cache_seqlens, k, v, *settings, forced_backend())
    return (out, lse) if return_lse else out


def _check_memory(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """What is written must not be written twice within a cache."""
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if overlaps_itself(x):
            raise ValueError(
                f"{_OP}: {name}: expected memory of its own for each element, got an expanded or overlapping view with"
                f" strides {x.stride()}; call .contiguous()"
            )


def _check_lengths(lengths: Any, q: torch.Tensor) -> None:
    if not isinstance(lengths, torch.Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        got = lengths.dtype if isinstance(lengths, torch.Tensor) else type(lengths).__name__
        raise TypeError(f"{_OP}: cache_seqlens: expected an int32 tensor, got {got}")
    checks.same_device(_OP, "cache_seqlens", lengths, "q", q)
    if tuple(lengths.shape) != (q.size(0),):
        raise ValueError(f"{_OP}: cache_seqlens: expected shape ({q.size(0)},), got {tuple(lengths.shape)}")
