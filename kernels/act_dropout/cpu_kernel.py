"""act_dropout on the CPU: allocates the result and calls cpu_kernel.cpp."""

import torch

from genai_fast.kernels.act_dropout.reference import dense
from genai_fast.kernels.common.activations import ACTIVATION_CODE
from genai_fast.kernels.common.channels import like_layout
from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.philox import scale, threshold
from genai_fast.kernels.common.rows import DTYPE_CODE, address, require_alike, require_seed


def _draw(x, seed, p):
    """Address of the seed (0: keep all), and the largest word that is dropped."""
    if seed is not None:
        require_seed(seed, x)
    limit = threshold(p)
    return (address(seed), limit - 1) if seed is not None and limit else (0, 0)


def act_dropout(x, seed, p, offset, activation, slope):
    x = dense(x)
    drawn, bound = _draw(x, seed, p)
    y = torch.empty_like(x)
    cpp.act_dropout(
        address(x), DTYPE_CODE[x.dtype], address(y), x.numel(), drawn, offset, bound, scale(p),
        ACTIVATION_CODE[activation], slope
    )  # fmt: skip
    return y


def act_dropout_backward(grad_y, saved, seed, p, offset, from_output, activation, slope):
    require_alike(saved, grad_y)
    saved = dense(saved)
    grad_y = like_layout(grad_y, saved)
    drawn, bound = _draw(saved, seed, p)
    grad_x = torch.empty_like(saved)
    cpp.act_dropout_backward(
        address(grad_y), address(saved), DTYPE_CODE[saved.dtype], address(grad_x), saved.numel(), drawn,
        offset, bound, scale(p), 1.0 - p, from_output, ACTIVATION_CODE[activation], slope
    )  # fmt: skip
    return grad_x
