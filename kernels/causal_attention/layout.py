"""Tensors [B, H, T, D] as the kernels read and write them: by address, any strides but the last."""

from __future__ import annotations

import torch

from genai_fast.kernels.common.rows import require_seed


def empty_heads_inside(x: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised [B, H, T, D] in the memory order [B, T, H, D]: the heads of a token side by side."""
    b, h, t, d = shape
    return torch.empty((b, t, h, d), dtype=x.dtype, device=x.device).transpose(1, 2)


def heads_inside(x: torch.Tensor) -> torch.Tensor:
    """A copy in that order, unless x lies so."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _dense_channels(x: torch.Tensor) -> torch.Tensor:
    return x if x.size(-1) == 1 or x.stride(-1) == 1 else heads_inside(x)


def require_heads(q, k, v, starts_q, starts_k, seed):
    """The tensors with dense channels, the beginnings as dense int32; raise unless they fit.

    The public op has checked already, with better words; this is for calls of torch.ops.genai_fast itself.
    """
    b, h, _, d = q.shape
    fits = (
        k.dim() == 4 and k.shape == v.shape and k.size(0) == b and k.size(3) == d and k.size(1) > 0
        and h % k.size(1) == 0 and k.dtype is q.dtype and v.dtype is q.dtype and k.device == q.device == v.device
    )  # fmt: skip
    if not fits:
        raise ValueError(
            f"genai_fast: expected q [B, H, T_q, D] and k, v [B, H_kv, T_k, D] of one dtype and device, got q {q.dtype}"
            f" {tuple(q.shape)}, k {k.dtype} {tuple(k.shape)}, v {v.dtype} {tuple(v.shape)}"
        )
    if seed is not None:
        require_seed(seed, q)
    if (starts_q is None) != (starts_k is None) or (starts_q is not None and starts_q.shape != starts_k.shape):
        raise ValueError("genai_fast: expected the beginnings of as many sequences of queries as of keys")
    starts = (None if s is None else s.to(torch.int32).contiguous() for s in (starts_q, starts_k))
    return *(_dense_channels(x) for x in (q, k, v)), *starts


def require_rows(q, grad_out, out, lse, grad_lse):
    """What belongs to rows of q, ready to be read; raise unless it fits."""
    if not (grad_out.shape == out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype is torch.float32):
        raise ValueError(f"genai_fast: expected a gradient, result and lse of q's {tuple(q.shape)}")
    if grad_lse is not None:
        grad_lse = grad_lse.float().contiguous()
    return _dense_channels(grad_out.to(q.dtype)), _dense_channels(out), lse.contiguous(), grad_lse
