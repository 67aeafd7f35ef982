"""Tensors [B, H, T, D] as the kernels read and write them: by address, any strides but the last."""

import torch

from genai_fast.kernels.common.rows import require_seed


def heads_inside(x: torch.Tensor) -> bool:
    """Whether the heads of a token lie side by side, [B, T, H, D] in memory, as a projection leaves them."""
    return x.stride(1) < x.stride(2)


def empty_alike(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised, dense, of x's shape and with x's order of heads and tokens."""
    b, h, t, d = x.shape
    options = dict(dtype=x.dtype, device=x.device)
    return torch.empty((b, t, h, d), **options).transpose(1, 2) if heads_inside(x) else torch.empty(x.shape, **options)


def alike(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y in the memory order of `empty_alike(x)`."""
    return y.transpose(1, 2).contiguous().transpose(1, 2) if heads_inside(x) else y.contiguous()


def _dense_channels(x: torch.Tensor) -> torch.Tensor:
    return x if x.size(-1) == 1 or x.stride(-1) == 1 else x.contiguous()


def require_heads(q, k, v, starts_q, starts_k, seed, in_place=False):
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
    if in_place and any(x.size(3) > 1 and x.stride(3) != 1 for x in (k, v)):
        raise ValueError(f"genai_fast: expected caches with channels of stride 1, got {k.stride()} and {v.stride()}")
    if seed is not None:
        require_seed(seed, q)
    starts = (starts_q, starts_k)
    if (starts_q is None) != (starts_k is None) or (starts_q is not None and starts_q.shape != starts_k.shape):
        raise ValueError("genai_fast: expected the beginnings of as many sequences of queries as of keys")
    if starts_q is not None and (starts_q.dim() != 1 or not starts_q.numel() or b != 1):
        raise ValueError(
            f"genai_fast: expected beginnings [N + 1] of sequences packed in a batch of 1, got {tuple(starts_q.shape)}"
            f" and a batch of {b}"
        )
    if any(s is not None and s.device != q.device for s in starts):
        raise ValueError(f"genai_fast: expected the beginnings of sequences on {q.device}")
    return *(_dense_channels(x) for x in (q, k, v)), *(s if s is None else _int32(s) for s in starts)


def _int32(x: torch.Tensor) -> torch.Tensor:
    """x, dense; what int32 cannot hold stays too large, or too small, to be taken for a place."""
    return (x if x.dtype is torch.int32 else x.clamp(-1, 2**31 - 1).to(torch.int32)).contiguous()


def require_lengths(q, k_cache, lengths, k):
    """Raise unless there is a length for each sample, and a new key for each query."""
    if lengths.shape != q.shape[:1] or lengths.device != q.device:
        raise ValueError(f"genai_fast: expected {q.size(0)} lengths on {q.device}, got {lengths.shape}")
    if k is not None and (k.size(2) != q.size(2) or k.size(1) != k_cache.size(1)):
        raise ValueError(f"genai_fast: expected {q.size(2)} new keys of {k_cache.size(1)} heads, got {tuple(k.shape)}")


def require_rows(q, grad_out, out, lse, grad_lse):
    """What belongs to rows of q, ready to be read; raise unless it fits."""
    fits = grad_out.shape == out.shape == q.shape and out.dtype is q.dtype and lse.dtype is torch.float32
    rows = (lse,) if grad_lse is None else (lse, grad_lse)
    if not fits or any(x.shape != q.shape[:3] for x in rows) or any(x.device != q.device for x in (out, *rows)):
        raise ValueError(
            f"genai_fast: expected a gradient and a result of q's {tuple(q.shape)}, lse and its gradient"
            f" {tuple(q.shape[:3])} on {q.device}, got {tuple(grad_out.shape)}, {out.dtype} {tuple(out.shape)} and"
            f" {[tuple(x.shape) for x in rows]}"
        )
    if grad_lse is not None:
        if grad_lse.shape != lse.shape or grad_lse.device != lse.device:
            raise ValueError(f"genai_fast: expected a gradient of lse {tuple(lse.shape)}, got {tuple(grad_lse.shape)}")
        grad_lse = grad_lse.float().contiguous()
    return _dense_channels(grad_out.to(q.dtype)), _dense_channels(out), lse.contiguous(), grad_lse
