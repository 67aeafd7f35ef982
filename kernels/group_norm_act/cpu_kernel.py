"""group_norm_act on the CPU: allocates the results and calls cpu_kernel.cpp."""

import torch

from genai_fast.kernels.common.activations import ACTIVATION_CODE
from genai_fast.kernels.common.channels import like_partner
from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address
from genai_fast.kernels.group_norm_act.layout import prepared, require_statistics, sizes


def group_norm_act_forward(x, groups, weight, bias, scale, shift, residual, after, eps, activation, slope):
    x, parameters = prepared(x, groups, weight, bias, scale, shift)
    residual = like_partner(residual, x)
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(x.size(0), groups, dtype=torch.float32, device="cpu") for _ in range(2))
    if x.numel():
        cpp.group_norm_act_forward(
            address(x), DTYPE_CODE[x.dtype], address(y), *sizes(x), groups, *map(address, parameters),
            address(residual), after, address(mean), address(rstd), eps, ACTIVATION_CODE[activation], slope
        )  # fmt: skip
    return y, mean, rstd


def group_norm_act_backward(
    grad_y, x, groups, weight, bias, scale, shift, beside, from_output, mean, rstd, activation, slope
):  # fmt: skip
    x, parameters = prepared(x, groups, weight, bias, scale, shift)
    grad_y, beside = like_partner(grad_y, x), like_partner(beside, x)
    statistics = require_statistics(x, groups, mean, rstd)
    grad_x = torch.empty_like(x)
    dz = x.new_empty(0) if beside is None else torch.empty_like(x)
    sums = tuple(torch.zeros(x.shape[:2], dtype=torch.float32, device="cpu") for _ in range(2))
    if x.numel():
        cpp.group_norm_act_backward(
            address(grad_y), address(x), DTYPE_CODE[x.dtype], address(grad_x), 0 if beside is None else address(dz),
            *sizes(x), groups, *map(address, parameters), address(beside), from_output, *map(address, statistics),
            *map(address, sums), ACTIVATION_CODE[activation], slope
        )  # fmt: skip
    return grad_x, dz, *sums
