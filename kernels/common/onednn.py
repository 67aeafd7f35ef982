"""What oneDNN, PyTorch's library on CPUs, computes on this processor."""

import functools

import torch


@functools.cache
def serves(dtype: torch.dtype) -> bool:
    """Whether it multiplies and convolves in this dtype; narrow ones need wide vectors (AVX-512 for bfloat16)."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype is torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype is torch.float32
