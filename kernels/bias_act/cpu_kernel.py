"""bias_act on the CPU: allocates the results and calls cpu_kernel.cpp."""

import torch

from genai_fast.kernels.common.activations import code_beside
from genai_fast.kernels.common.channels import dense_channels, joined_extent, like_layout, require_bias_and_slopes
from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address, require_alike


def _repeated(vector: torch.Tensor | None, joined: int) -> torch.Tensor | None:
    return vector if vector is None or joined == 1 else vector.repeat(joined)


def bias_act(x, bias, slopes, activation, slope):
    x = dense_channels(x)
    vectors = require_bias_and_slopes(x, bias, slopes)
    shape, joined = joined_extent(x, any(v is not None and v.numel() != 1 for v in vectors))
    bias, slopes = (_repeated(v, joined) for v in vectors)
    y = torch.empty_like(x)
    cpp.bias_act(
        address(x), DTYPE_CODE[x.dtype], address(y), *shape, address(bias), address(slopes),
        code_beside(slopes, activation), slope
    )  # fmt: skip
    return y


def bias_act_backward(grad_y, saved, bias, slopes, from_output, with_bias, activation, slope):
    require_alike(saved, grad_y)
    saved = dense_channels(saved)
    grad_y = like_layout(grad_y, saved)
    vectors = require_bias_and_slopes(saved, None if from_output else bias, slopes)
    wanted = (with_bias, slopes is not None)
    shape, joined = joined_extent(saved, with_bias or any(v is not None and v.numel() != 1 for v in vectors))
    bias, slopes = (_repeated(v, joined) for v in vectors)
    grad_x, make = torch.empty_like(saved), torch.empty if saved.numel() else torch.zeros
    sums = [make(shape[1] if w else 0, dtype=torch.float32, device="cpu") for w in wanted]
    if saved.numel():
        cpp.bias_act_backward(
            address(grad_y), address(saved), DTYPE_CODE[saved.dtype], address(grad_x),
            *(address(s) if w else 0 for s, w in zip(sums, wanted, strict=True)), *shape, address(bias),
            address(slopes), from_output, code_beside(slopes, activation), slope
        )  # fmt: skip
    return grad_x, *(
        s if joined == 1 or not w else s.view(joined, -1).sum(0) for s, w in zip(sums, wanted, strict=True)
    )
