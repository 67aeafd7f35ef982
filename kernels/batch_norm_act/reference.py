"""batch_norm_act in plain PyTorch: the definition, the fallback and the second derivatives.

z = (x - mean) rstd weight + bias, y = activate(z); mean and rstd by channel, over all other dimensions.
"""

import torch

from genai_fast.kernels.common.activations import activate, derivative
from genai_fast.kernels.common.channels import dense_channels, like_layout, per_channel, reduced_dims, wide
from genai_fast.kernels.common.moments import moments, statistics


def _scale(weight: torch.Tensor | None, rstd: torch.Tensor) -> torch.Tensor:
    return rstd if weight is None else weight * rstd


def _preactivation(x, weight, bias, mean, rstd):
    z = (x - per_channel(mean, x)) * per_channel(_scale(weight, rstd), x)
    return z if bias is None else z + per_channel(bias, x)


def batch_norm_statistics(x, running_mean, running_var, momentum, eps):
    """(mean, sum of squared deviations, 1 / sqrt(biased variance + eps)); running statistics move by momentum."""
    return statistics(x, running_mean, running_var, momentum, eps)


def batch_norm_act_apply(x, weight, bias, mean, rstd, activation, slope):
    """y = activate((x - mean) rstd weight + bias)."""
    x = dense_channels(x)
    y = activate(_preactivation(wide(x), weight, bias, mean, rstd), activation, slope)
    return like_layout(y.to(x.dtype), x)


def _dz(grad_y, x, weight, bias, mean, rstd, activation, slope):
    return wide(grad_y) * derivative(_preactivation(x, weight, bias, mean, rstd), activation, slope)


def batch_norm_act_reduce(grad_y, x, weight, bias, mean, rstd, activation, slope):
    """(sum of dz, sum of dz x-hat) by channel: the gradients of bias and weight."""
    x = wide(x)
    dz = _dz(grad_y, x, weight, bias, mean, rstd, activation, slope)
    x_hat = (x - per_channel(mean, x)) * per_channel(rstd, x)
    dims = reduced_dims(x)
    return dz.sum(dims), (dz * x_hat).sum(dims)


def batch_norm_act_grad(grad_y, x, weight, bias, mean, rstd, sum_dz, sum_dz_x_hat, count, activation, slope):
    """dx = weight rstd (dz - sum(dz) / count - x-hat sum(dz x-hat) / count); without sums the statistics are fixed."""
    dense = dense_channels(x)
    x = wide(dense)
    dz = _dz(grad_y, x, weight, bias, mean, rstd, activation, slope)
    if sum_dz is not None:
        x_hat = (x - per_channel(mean, x)) * per_channel(rstd, x)
        dz = dz - per_channel(sum_dz / count, x) - x_hat * per_channel(sum_dz_x_hat / count, x)
    return like_layout((dz * per_channel(_scale(weight, rstd), x)).to(dense.dtype), dense)


def gradients(grad_y, x, weight, bias, mean, rstd, batch_statistics, eps, activation, slope):
    """Gradients of x, weight and bias that can be differentiated again: batch statistics are computed from x again."""
    if batch_statistics:
        count = x.numel() // x.size(1)
        mean, squares = moments(wide(x))
        rstd = torch.rsqrt(squares / count + eps)
    sums = batch_norm_act_reduce(grad_y, x, weight, bias, mean, rstd, activation, slope)
    used = (*sums, x.numel() // x.size(1)) if batch_statistics else (None, None, 1)
    dx = batch_norm_act_grad(grad_y, x, weight, bias, mean, rstd, *used, activation, slope)
    return dx, None if weight is None else sums[1], None if bias is None else sums[0]
