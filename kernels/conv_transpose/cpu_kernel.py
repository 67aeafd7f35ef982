"""conv_transpose on the CPU: allocates the results and calls cpu_kernel.cpp."""

from __future__ import annotations

import torch

from genai_fast.kernels.common.activations import ACTIVATION_CODE
from genai_fast.kernels.common.extension import cpu_kernels
from genai_fast.kernels.common.rows import DTYPE_CODE, address

FEW = 8  # result channels; with more, torch's own kernels are as good
MOST_KERNEL = 6
MOST_STRIDE = 2


def _beside(x: torch.Tensor) -> torch.Tensor:
    """x itself if its channels or the pixels of its rows lie one beside the other, else a contiguous copy."""
    return x if 1 in (x.stride(1), x.stride(3)) else x.contiguous()


def _channels_last(x: torch.Tensor) -> bool:
    """Whether x is channels_last and not also contiguous."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _out_size(size, kernel, stride, padding, output_padding):
    return [(s - 1) * d - 2 * p + k + o for s, k, d, p, o in zip(size, kernel, stride, padding, output_padding, strict=True)]


def conv_transpose(x, weight, bias, stride, padding, output_padding, activation, slope):
    few, *kernel = weight.shape[1:]
    out = _out_size(x.shape[2:], kernel, stride, padding, output_padding)
    last = _channels_last(x)
    x = _beside(x)
    weight = weight.float()
    bias = bias if bias is None else bias.float().contiguous()
    y = torch.empty(
        (x.size(0), few, *out), dtype=x.dtype, device="cpu",
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip
    cpu_kernels()[0]["conv_transpose"](
        x.data_ptr(), DTYPE_CODE[x.dtype], *x.stride(), weight.data_ptr(), *weight.stride(), address(bias),
        y.data_ptr(), last, *x.shape[:2], few, *x.shape[2:], *out, *kernel, *stride, *padding,
        ACTIVATION_CODE[activation], slope, torch.get_num_threads(),
    )  # fmt: skip
    return y
