"""group_norm_act in plain PyTorch: the definition, the fallback and the second derivatives.

x-hat = (x - mean) rstd, z = (x-hat weight + bias) (1 + scale) + shift + residual, y = activate(z); mean and rstd by
sample and group of channels, weight and bias by channel, scale and shift by sample and channel.
"""

import torch

from genai_fast.kernels.common.activations import activate, derivative, derivative_from_output
from genai_fast.kernels.common.channels import dense_channels, like_layout, per_channel, wide


def _spread(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[N, C] -> [N, C, 1, ...]."""
    return p.view(*x.shape[:2], *[1] * (x.dim() - 2))


def _by_channel(statistic: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[N, groups] -> [N, C, 1, ...]."""
    return _spread(statistic.repeat_interleave(x.size(1) // max(statistic.size(1), 1), 1), x)


def _statistics(x: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, 1 / sqrt(biased variance + eps)) of each sample's groups."""
    rows = x.reshape(x.size(0), groups, x[0].numel() // groups if x.size(0) else 1)
    mean = rows.mean(2)
    lost = (rows - mean[..., None]).mean(2)  # to rounding, where the mean is far from 0
    mean = mean + torch.where(mean.isfinite(), lost, 0.0)
    return mean, torch.rsqrt((rows - mean[..., None]).square().mean(2) + eps)


def _z(x_hat, weight, bias, scale, shift, residual):
    z = x_hat if weight is None else x_hat * per_channel(weight, x_hat)
    z = z if bias is None else z + per_channel(bias, x_hat)
    z = z if scale is None else z * (1.0 + _spread(scale, x_hat))
    z = z if shift is None else z + _spread(shift, x_hat)
    return z if residual is None else z + wide(residual)


def group_norm_act_forward(x, groups, weight, bias, scale, shift, residual, after, eps, activation, slope):
    """(y, mean, rstd); if `after`, the residual is added outside of the activation."""
    dense = dense_channels(x)
    x = wide(dense)
    mean, rstd = _statistics(x, groups, eps)
    x_hat = (x - _by_channel(mean, x)) * _by_channel(rstd, x)
    y = activate(_z(x_hat, weight, bias, scale, shift, None if after else residual), activation, slope)
    y = y + wide(residual) if after and residual is not None else y
    return like_layout(y.to(dense.dtype), dense), mean, rstd


def group_norm_act_backward(
    grad_y, x, groups, weight, bias, scale, shift, beside, from_output, mean, rstd, activation, slope
):  # fmt: skip
    """(dx, dz, sum of dz, sum of dz x-hat), the sums by sample and channel; dz is the residual's gradient.

    `beside` is the residual, or y if from_output; without a residual it is None, and dz empty.
    """
    dense = dense_channels(x)
    x = wide(dense)
    by_sample = _by_channel(rstd, x)
    x_hat = (x - _by_channel(mean, x)) * by_sample
    if from_output:
        factor = derivative_from_output(wide(beside), activation, slope)
    else:
        factor = derivative(_z(x_hat, weight, bias, scale, shift, beside), activation, slope)
    dz = wide(grad_y) * factor
    positions = list(range(2, x.dim()))  # of vectors none, and a sum over none is over all
    sum_dz, sum_dz_x_hat = (t.sum(positions) if positions else t for t in (dz, dz * x_hat))
    d_x_hat = dz if weight is None else dz * per_channel(weight, x)
    d_x_hat = d_x_hat if scale is None else d_x_hat * (1.0 + _spread(scale, x))

    def mean_of(t):
        rows = t.reshape(t.size(0), groups, -1) if t.numel() else t.new_zeros(t.size(0), groups, 1)
        return _by_channel(rows.mean(2), x)

    dx = by_sample * (d_x_hat - mean_of(d_x_hat) - x_hat * mean_of(d_x_hat * x_hat))
    dz = x.new_empty(0, dtype=dense.dtype) if beside is None else like_layout(dz.to(dense.dtype), dense)
    return like_layout(dx.to(dense.dtype), dense), dz, sum_dz, sum_dz_x_hat


def gradients(grad_y, x, groups, weight, bias, scale, shift, beside, from_output, eps, activation, slope):
    """The same, to be differentiated again: the statistics are computed from x again."""
    mean, rstd = _statistics(wide(x), groups, eps)
    return group_norm_act_backward(
        grad_y, x, groups, weight, bias, scale, shift, beside, from_output, mean, rstd, activation, slope
    )
