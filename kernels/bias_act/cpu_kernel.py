"""bias_act on the CPU: allocates the results and calls cpu_kernel.cpp."""

import torch

from genai_fast.kernels.common.activations import ACTIVATION_CODE
from genai_fast.kernels.common.channels import dense_channels, joined_extent, like_layout, require_channels
from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address, require_alike


def _repeated(bias: torch.Tensor | None, joined: int) -> torch.Tensor | None:
    return bias if bias is None or joined == 1 else bias.repeat(joined)


def bias_act(x, bias, activation, slope):
    x = dense_channels(x)
    (bias,) = require_channels(x, bias)
    shape, joined = joined_extent(x, bias is not None)
    bias, y = _repeated(bias, joined), torch.empty_like(x)
    cpp.bias_act(address(x), DTYPE_CODE[x.dtype], address(y), *shape, address(bias), ACTIVATION_CODE[activation], slope)
    return y


def bias_act_backward(grad_y, saved, bias, from_output, with_bias, activation, slope):
    require_alike(saved, grad_y)
    saved = dense_channels(saved)
    grad_y = like_layout(grad_y, saved)
    (bias,) = require_channels(saved, None if from_output else bias)
    shape, joined = joined_extent(saved, with_bias or bias is not None)
    bias, grad_x = _repeated(bias, joined), torch.empty_like(saved)
    empty = with_bias and saved.numel() == 0
    sums = (torch.zeros if empty else torch.empty)(shape[1] if with_bias else 0, dtype=torch.float32, device="cpu")
    if not empty:
        cpp.bias_act_backward(
            address(grad_y), address(saved), DTYPE_CODE[saved.dtype], address(grad_x),
            address(sums) if with_bias else 0, *shape, address(bias), from_output, ACTIVATION_CODE[activation],
            slope
        )  # fmt: skip
    return grad_x, sums if joined == 1 or not with_bias else sums.view(joined, -1).sum(0)
