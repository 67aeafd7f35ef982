"""Our attention among those of transformers, with the windows and soft caps that PyTorch's attention lacks."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F

from genai_fast import ops
from genai_fast.backends import choose, forced_backend, is_plain
from genai_fast.ops.dispatch import left_to_torch

__all__ = ["register_attention"]

_NAME = "genai_fast"
_MOST_CHANNELS = 256
# Arguments by which a model asks for what the kernels do not do.
_OTHERS = ("position_bias", "s_aux", "head_mask")


def register_attention() -> str:
    """Add ops.causal_attention to transformers' attention implementations: model.set_attn_implementation("genai_fast").

    Causal attention, whole or in a sliding window (Mistral, Gemma), with grouped keys and with a soft cap of the scores
    (Gemma 2), is one kernel without a mask in memory. Batches with padding, other masks, position biases, sinks and
    what has no kernel are computed as by transformers: by PyTorch's attention, or by the formula with a soft cap.
    Dropout draws other numbers than PyTorch's. `genai_fast.enable_sdpa` serves models that stay with "sdpa", as far as
    these call PyTorch's attention without a mask.

    Returns: "genai_fast", the name to set. A second call does nothing.
    Raises ModuleNotFoundError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "register_attention: expected transformers, which is not installed; remedy: pip install transformers"
        )
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    return _NAME


def _mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0, mask_function: Any = None,
    attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **settings: Any,
) -> torch.Tensor | None:  # fmt: skip
    """None where queries see all keys up to their own, or those of a window that the layer passes on; else a mask."""
    from transformers import masking_utils

    mask_function = masking_utils.causal_mask_function if mask_function is None else mask_function
    window = _window_of(mask_function, masking_utils)
    ends = type(q_offset) is type(kv_offset) is int and q_offset + q_length == kv_offset + kv_length
    whole = ends and (q_length in (1, kv_length)) and allow_is_causal_skip
    served = window is not None and whole and _is_served(settings.get("device"), settings.get("dtype"))
    if served and not _is_padded(attention_mask, kv_length):
        return None
    return masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        allow_is_causal_skip=allow_is_causal_skip, **settings,
    )  # fmt: skip


def _is_padded(attention_mask: torch.Tensor | None, kv_length: int) -> bool:
    return attention_mask is not None and (attention_mask.shape[-1] != kv_length or not bool(attention_mask.all()))


def _window_of(mask_function: Any, utils: Any) -> int | None:
    """Of a causal mask, 0 if it has none; None of other masks."""
    if mask_function is utils.causal_mask_function:
        return 0
    parts = _variables(mask_function, utils.and_masks).get("mask_functions", ())
    if len(parts) != 2 or parts[1] is not utils.causal_mask_function:
        return None
    width = _variables(parts[0], utils.sliding_window_overlay).get("sliding_window")
    return width if type(width) is int else None


def _variables(function: Any, maker: Any) -> dict[str, Any]:
    """What a function that this maker returned has from it; nothing of others."""
    code = getattr(function, "__code__", None)
    if code is None or not any(code is constant for constant in maker.__code__.co_consts):
        return {}
    return {n: c.cell_contents for n, c in zip(code.co_freevars, function.__closure__ or (), strict=True)}


def _is_served(device: Any, dtype: torch.dtype | None) -> bool:
    """Whether ours is the faster one for tensors like these: a CPU has instructions for narrow types."""
    kind = torch.device(device or "cpu").type
    narrow = dtype in (torch.float16, torch.bfloat16)
    return not choose("causal_attention", forced_backend(), kind, dtype or torch.float32)[1] and (
        narrow if kind == "cuda" else dtype is torch.float32
    )


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
    sliding_window: int | None = None, softcap: float | None = None, **others: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """(attention [B, T, H, D], None), as transformers' own functions."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = sliding_window if causal and sliding_window and sliding_window < key.shape[2] else None
    if attention_mask is None and causal and 1 < query.shape[2] < key.shape[2]:
        # The first step of a static cache, where transformers leaves the mask out: later places hold nothing yet.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if attention_mask is None and window and query.shape[2] == 1:  # then the window is a part of the keys
        key, value, window = key[:, :, -window:], value[:, :, -window:], None
    special = any(others.get(name) is not None for name in _OTHERS)
    if attention_mask is not None or special or not _fits(query, key, value):
        kernel = False
    else:
        several = query.shape[2] > 1  # of one query PyTorch's attention is as fast
        kernel = bool(window or softcap) or (several and _is_served(query.device, query.dtype))
    if kernel:
        settings = dict(scale=scaling, window=window, softcap=softcap, causal=bool(causal), dropout=dropout)
        out = ops.causal_attention(query, key, value, **settings)  # type: ignore[arg-type]
        assert isinstance(out, torch.Tensor)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is None and window:
        attention_mask = _windowed(query, key, window)
    if softcap is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    if attention_mask is None and causal:
        attention_mask = _windowed(query, key, key.shape[2])
    return _by_formula(query, key, value, attention_mask, dropout, scaling, softcap), None


def _fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernels take these."""
    if not all(is_plain(x) and x.dim() == 4 and x.dtype is q.dtype and x.device == q.device for x in (q, k, v)):
        return False
    alike = k.shape == v.shape and k.size(0) == q.size(0) and k.size(3) == q.size(3) and k.size(1)
    if not alike or q.size(1) % k.size(1) or not 1 <= q.size(3) <= _MOST_CHANNELS or q.size(2) > k.size(2):
        return False
    if left_to_torch() or any(x.size(3) > 1 and x.stride(3) != 1 for x in (q, k, v)):
        return False
    return q.dtype is not torch.float64 and not choose("causal_attention", forced_backend(), q.device.type, q.dtype)[1]


def _windowed(q: torch.Tensor, k: torch.Tensor, window: int) -> torch.Tensor:
    """[1, 1, T_q, T_k]: each query sees the last `window` keys up to its own, the last query's being the last key."""
    at_k = torch.arange(k.shape[2], device=q.device)
    at_q = at_k[k.shape[2] - q.shape[2] :, None]
    return ((at_k <= at_q) & (at_k > at_q - window))[None, None]


def _by_formula(q, k, v, mask, dropout, scaling, softcap):
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype is torch.bool else scores + mask
    weights = F.dropout(F.softmax(scores, -1, dtype=torch.float32).to(q.dtype), dropout)
    return (weights @ v).transpose(1, 2).contiguous()
