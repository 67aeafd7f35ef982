"""conv_transpose to few channels on the CPU: allocates the result and calls cpu_kernel.cpp."""

from __future__ import annotations

import torch

from genai_fast.kernels.common.activations import ACTIVATION_CODE
from genai_fast.kernels.common.extension import cpu_kernels
from genai_fast.kernels.common.rows import DTYPE_CODE, address, require_alike
from genai_fast.kernels.conv_transpose.shapes import empty_channels_last, not_served, output_size


def conv_transpose(x, weight, bias, stride, padding, output_padding, activation, slope):
    if x.size(1) != weight.size(0) or x.dtype is not weight.dtype or not (x.is_cpu and weight.is_cpu):
        raise ValueError(
            f"genai_fast: conv_transpose: expected a weight for {x.size(1)} channels, of {x.dtype} on the CPU, got"
            f" {tuple(weight.shape)} {weight.dtype} on {weight.device}"
        )
    few, *kernel = weight.shape[1:]
    if bias is not None:
        require_alike(weight[0, :, 0, 0], bias, dtype=False)
        bias = bias.float().contiguous()
    out = output_size(x.shape[2:], kernel, stride, padding, output_padding)
    y = empty_channels_last(x, x.size(0), few, *out)
    if refusal := not_served(x.shape, y.shape, kernel, stride, few=True):
        raise ValueError(f"genai_fast: conv_transpose: {refusal}")
    if 1 not in (x.stride(1), x.stride(3)):  # channels or a row's pixels must lie one beside the other
        x = x.contiguous()
    weight = weight.float()
    cpu_kernels()[0]["conv_transpose"](
        x.data_ptr(), DTYPE_CODE[x.dtype], *x.stride(), weight.data_ptr(), *weight.stride(), address(bias),
        y.data_ptr(), True, *x.shape[:2], few, *x.shape[2:], *out, *kernel, *stride, *padding,
        ACTIVATION_CODE[activation], slope, torch.get_num_threads(),
    )  # fmt: skip
    return y
