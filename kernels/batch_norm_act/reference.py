"""batch_norm_act in plain PyTorch: the definition, the fallback and the second derivatives.

z = (x - mean) rstd weight + bias + residual, y = activate(z); mean and rstd by channel, over all other dimensions.
"""

import torch

from genai_fast.kernels.common.activations import activate, derivative, derivative_by_slope, derivative_from_output
from genai_fast.kernels.common.channels import dense_channels, like_layout, per_channel, reduced_dims, wide
from genai_fast.kernels.common.moments import moments, statistics


def _scale(weight: torch.Tensor | None, rstd: torch.Tensor) -> torch.Tensor:
    return rstd if weight is None else weight * rstd


def _preactivation(x, weight, bias, mean, rstd, residual):
    z = (x - per_channel(mean, x)) * per_channel(_scale(weight, rstd), x)
    z = z if bias is None else z + per_channel(bias, x)
    return z if residual is None else z + wide(residual)


def batch_norm_statistics(x, running_mean, running_var, momentum, eps):
    """(mean, sum of squared deviations, 1 / sqrt(biased variance + eps)); running statistics move by momentum."""
    return statistics(x, running_mean, running_var, momentum, eps)


def _slope(slopes, slope, x):
    return slope if slopes is None else per_channel(slopes, x)


def batch_norm_act_apply(x, weight, bias, slopes, mean, rstd, residual, after, activation, slope):
    """y = activate((x - mean) rstd weight + bias + residual); if `after`, the residual is added outside."""
    x = dense_channels(x)
    before = None if after else residual
    z = _preactivation(wide(x), weight, bias, mean, rstd, before)
    y = activate(z, activation, _slope(slopes, slope, x))
    y = y + wide(residual) if after and residual is not None else y
    return like_layout(y.to(x.dtype), x)


def _dz(grad_y, x, weight, bias, slopes, mean, rstd, beside, from_output, activation, slope):
    """dz, and what each element adds to the gradient of the slopes or None."""
    if from_output:
        return wide(grad_y) * derivative_from_output(wide(beside), activation, slope), None
    z = _preactivation(x, weight, bias, mean, rstd, beside)
    dz = wide(grad_y) * derivative(z, activation, _slope(slopes, slope, x))
    return dz, None if slopes is None else derivative_by_slope(wide(grad_y), z)


def batch_norm_act_reduce(grad_y, x, weight, bias, slopes, mean, rstd, beside, from_output, activation, slope):
    """(sum of dz, sum of dz x-hat) by channel, the gradients of bias and weight; dz, which is the residual's; and the
    gradient of the slopes, empty without them.

    `beside` is the residual, or y if from_output; without a residual it is None, and dz empty.
    """
    dense = dense_channels(x)
    x = wide(dense)
    dz, by_slope = _dz(grad_y, x, weight, bias, slopes, mean, rstd, beside, from_output, activation, slope)
    x_hat = (x - per_channel(mean, x)) * per_channel(rstd, x)
    dims = reduced_dims(x)
    narrow = x.new_empty(0, dtype=dense.dtype) if beside is None else like_layout(dz.to(dense.dtype), dense)
    grad_slopes = x.new_empty(0) if by_slope is None else by_slope.sum(dims)
    return dz.sum(dims), (dz * x_hat).sum(dims), narrow, grad_slopes


def batch_norm_act_grad(grad_y, x, weight, bias, slopes, mean, rstd, sum_dz, sum_dz_x_hat, count, activation, slope):
    """dx = weight rstd (dz - sum(dz) / count - x-hat sum(dz x-hat) / count); without sums the statistics are fixed."""
    dense = dense_channels(x)
    x = wide(dense)
    dz, _ = _dz(grad_y, x, weight, bias, slopes, mean, rstd, None, False, activation, slope)
    if sum_dz is not None:
        x_hat = (x - per_channel(mean, x)) * per_channel(rstd, x)
        dz = dz - per_channel(sum_dz / count, x) - x_hat * per_channel(sum_dz_x_hat / count, x)
    return like_layout((dz * per_channel(_scale(weight, rstd), x)).to(dense.dtype), dense)


def gradients(
    grad_y, x, weight, bias, slopes, mean, rstd, beside, from_output, batch_statistics, eps, activation, slope
):  # fmt: skip
    """Gradients of x, weight, bias, slopes and residual that can be differentiated again: batch statistics are computed
    from x again."""
    if batch_statistics:
        count = x.numel() // x.size(1)
        mean, squares = moments(wide(x))
        rstd = torch.rsqrt(squares / count + eps)
    given = (x, weight, bias, slopes, mean, rstd)
    *sums, dz, grad_slopes = batch_norm_act_reduce(grad_y, *given, beside, from_output, activation, slope)
    used = (*sums, x.numel() // x.size(1)) if batch_statistics else (None, None, 1)
    settings = (activation, slope)
    if beside is None:
        dz = grad_y  # to a residual that was added to the result itself
    else:
        slopes, settings = None, ("none", 0.0)
    dx = batch_norm_act_grad(dz, x, weight, bias, slopes, mean, rstd, *used, *settings)
    return dict(x=dx, weight=sums[1], bias=sums[0], slopes=grad_slopes, residual=dz)
