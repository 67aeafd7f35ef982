"""batch_norm_act on the CPU: allocates the results and calls cpu_kernel.cpp."""

import torch

from genai_fast.kernels.common.activations import code_beside
from genai_fast.kernels.common.channels import dense_channels, extent, like_partner, require_channels
from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address


def _vectors(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    return [torch.empty(x.size(1), dtype=torch.float32, device="cpu") for _ in range(count)]


def batch_norm_statistics(x, running_mean, running_var, momentum, eps):
    x = dense_channels(x)
    running = require_channels(x, running_mean, running_var, dtype=None)
    running = tuple(r if r is None else r.to(torch.float32) for r in running)  # a model in bfloat16: by a detour
    results = _vectors(x, 3)
    cpp.batch_norm_statistics(
        address(x), DTYPE_CODE[x.dtype], *extent(x), *map(torch.Tensor.data_ptr, results), *map(address, running),
        momentum, eps
    )  # fmt: skip
    for r, moved in zip((running_mean, running_var), running, strict=True):
        if moved is not r:
            r.copy_(moved)
    return tuple(results)


def batch_norm_act_apply(x, weight, bias, slopes, mean, rstd, residual, after, activation, slope):
    x = dense_channels(x)
    residual = like_partner(residual, x)
    parameters = require_channels(x, weight, bias, slopes, mean, rstd)
    y = torch.empty_like(x)
    cpp.batch_norm_act_apply(
        address(x), DTYPE_CODE[x.dtype], address(y), *extent(x), *map(address, parameters),
        address(residual), after, code_beside(slopes, activation), slope
    )  # fmt: skip
    return y


def batch_norm_act_reduce(grad_y, x, weight, bias, slopes, mean, rstd, beside, from_output, activation, slope):
    x = dense_channels(x)
    grad_y, beside = like_partner(grad_y, x), like_partner(beside, x)
    parameters = require_channels(x, weight, bias, slopes, mean, rstd)
    sums, dz = _vectors(x, 2), x.new_empty(0) if beside is None else torch.empty_like(x)
    grad_slopes = x.new_empty(0 if slopes is None else x.size(1), dtype=torch.float32)
    cpp.batch_norm_act_reduce(
        address(grad_y), address(x), DTYPE_CODE[x.dtype], *extent(x), *map(address, parameters),
        address(beside), from_output, *map(torch.Tensor.data_ptr, sums), 0 if beside is None else address(dz),
        0 if slopes is None else address(grad_slopes), code_beside(slopes, activation), slope
    )  # fmt: skip
    return *sums, dz, grad_slopes


def batch_norm_act_grad(grad_y, x, weight, bias, slopes, mean, rstd, sum_dz, sum_dz_x_hat, count, activation, slope):
    x = dense_channels(x)
    grad_y = like_partner(grad_y, x)
    parameters = require_channels(x, weight, bias, slopes, mean, rstd, sum_dz, sum_dz_x_hat)
    grad_x = torch.empty_like(x)
    cpp.batch_norm_act_grad(
        address(grad_y), address(x), DTYPE_CODE[x.dtype], address(grad_x), *extent(x),
        *map(address, parameters), count, code_beside(slopes, activation), slope
    )  # fmt: skip
    return grad_x
