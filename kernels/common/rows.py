"""Tensors as [batch, columns] for the kernels of rows.h: unit column stride, any row stride."""

from __future__ import annotations

import torch

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x as [B, ...] with dense row-major rows, and the stride between rows; copies only other layouts.

    Keep the tensor alive while its data_ptr is in use.
    """
    if not x.is_contiguous():
        x = x.unsqueeze(1) if x.dim() == 1 else x.flatten(1)
        if x.size(1) > 1 and x.stride(1) != 1:
            x = x.contiguous()
    return x, x.stride(0)


def per_sample_gradient(g: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """A gradient [B] or 0-d as float32: the tensor, its address (0 for None) and its stride (0 for one value)."""
    if g is None:
        return None, 0, 0
    if g.dtype is not torch.float32:
        g = g.float()
    return g, g.data_ptr(), g.stride(0) if g.dim() else 0


def columns_of(x: torch.Tensor) -> int:
    """Elements a sample."""
    batch = x.size(0)
    return x.numel() // batch if batch else 0


def dense_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised row-major memory of x's shape, dtype and device."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
