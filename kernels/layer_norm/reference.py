"""layer_norm and rms_norm in plain PyTorch: the definition, the fallback and the second derivatives.

h = x + residual, x-hat = (h - mean) rstd, y = x-hat weight + bias; all by row of the last dimension. RMS: mean is 0.
Its casting is where a norm of a narrow dtype rounds: "gemma" y alone, "llama" x-hat too, "none" each step.
"""

import torch

from genai_fast.kernels.common.channels import wide


def _statistics(x, rms, eps, casting):
    """(mean or None, 1 / sqrt(mean of squared deviations + eps)), each [..., 1], float32 or wider."""
    if casting == "none":
        return None, wide(torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
    h = wide(x)
    if rms:
        return None, torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    mean = h.mean(-1, keepdim=True)
    lost = (h - mean).mean(-1, keepdim=True)  # to rounding, where the mean is far from 0
    mean = mean + torch.where(mean.isfinite(), lost, 0.0)
    return mean, torch.rsqrt((h - mean).square().mean(-1, keepdim=True) + eps)


def _normalized(h, mean, rstd):
    return (h if mean is None else h - mean) * rstd


def _cast(x_hat, dtype, casting):
    return x_hat if casting == "gemma" else wide(x_hat.to(dtype))


def layer_norm(x, residual, weight, bias, rms, eps, casting):
    """(y, h or nothing, mean or nothing, rstd)."""
    h = x if residual is None else x + residual
    mean, rstd = _statistics(h, rms, eps, casting)
    y = _cast(_normalized(wide(h), mean, rstd), x.dtype, casting)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    nothing = rstd.new_empty(0)
    return (
        y.to(x.dtype).contiguous(),
        x.new_empty(0) if residual is None else h.contiguous(),
        nothing if mean is None else mean.squeeze(-1).contiguous(),
        rstd.squeeze(-1).contiguous(),
    )


def layer_norm_backward(grad_y, grad_h, h, weight, mean, rstd, with_weight, with_bias, rms, casting):
    """dx = rstd (g - mean(g) - x-hat mean(g x-hat)) + dh, g = dy weight;  sums over rows of dy x-hat and of dy.

    RMS: without mean(g).
    """
    dense, dy = h, wide(grad_y)
    x_hat = _normalized(wide(h), None if rms else mean.unsqueeze(-1), rstd.unsqueeze(-1))
    g = dy if weight is None else dy * weight
    dx = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    dx = (dx if rms else dx - g.mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    dx = dx if grad_h is None else dx + wide(grad_h)
    rows = tuple(range(h.dim() - 1))
    grad_weight, grad_bias = (
        (s.sum(rows) if rows else s.clone()) if wanted else dy.new_empty(0)
        for s, wanted in ((dy * _cast(x_hat, h.dtype, casting), with_weight), (dy, with_bias))
    )
    return dx.to(dense.dtype).contiguous(), grad_weight, grad_bias


def gradients(grad_y, grad_h, h, weight, with_weight, with_bias, rms, eps, casting):
    """layer_norm_backward that can be differentiated again: statistics are computed from h again."""
    mean, rstd = _statistics(h, rms, eps, casting)
    mean = None if mean is None else mean.squeeze(-1)
    return layer_norm_backward(grad_y, grad_h, h, weight, mean, rstd.squeeze(-1), with_weight, with_bias, rms, casting)
