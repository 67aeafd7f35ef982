"""Mean, squared deviations and reciprocal deviation of each channel in plain PyTorch, and running statistics."""

import torch

from genai_fast.kernels.common.channels import per_channel, reduced_dims, wide


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sum of squared deviations of each channel."""
    dims = reduced_dims(x)
    mean = x.mean(dims)
    lost = (x - per_channel(mean, x)).mean(dims)  # to rounding, where the mean is far from 0
    mean = mean + torch.where(mean.isfinite(), lost, 0.0)
    return mean, (x - per_channel(mean, x)).square().sum(dims)


def statistics(
    x: torch.Tensor, running_mean: torch.Tensor | None, running_var: torch.Tensor | None, momentum: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean, sum of squared deviations, 1 / sqrt(biased variance + eps)); running statistics move by momentum."""
    count = x.numel() // x.size(1)
    mean, squares = moments(wide(x))
    if running_mean is not None:
        running_mean.copy_((1.0 - momentum) * wide(running_mean) + momentum * mean)
        running_var.copy_((1.0 - momentum) * wide(running_var) + momentum * squares / (count - 1))
    return mean, squares, torch.rsqrt(squares / count + eps)
