"""What the kernels of vector_quantize and segment_sum ask of their tensors: they read by address."""

import math

import torch


def require_codes(x: torch.Tensor, codebook: torch.Tensor) -> None:
    """Raise unless the codebook [K, D] has a code and x [..., D] has its columns and device."""
    if codebook.dim() != 2 or not codebook.size(0) or x.shape[-1:] != codebook.shape[1:] or x.device != codebook.device:
        raise ValueError(
            f"genai_fast: expected x [..., D] and a codebook [K, D] on one device with K > 0, got {tuple(x.shape)} on"
            f" {x.device} and {tuple(codebook.shape)} on {codebook.device}"
        )


def require_indices(x: torch.Tensor, indices: torch.Tensor, segments: int) -> None:
    """Raise unless there is one int64 for each row of x [..., D], on its device."""
    if indices.shape != x.shape[:-1] or indices.dtype is not torch.int64 or indices.device != x.device or segments < 0:
        raise ValueError(
            f"genai_fast: expected torch.int64 {tuple(x.shape[:-1])} on {x.device} and segments >= 0, got"
            f" {indices.dtype} {tuple(indices.shape)} on {indices.device} and {segments}"
        )


def matrix(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [..., D] as [N, D] with unit column stride, and the stride between rows; there may be no columns."""
    x = x.reshape(math.prod(x.shape[:-1]), x.size(-1))
    if x.size(1) > 1 and x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)
