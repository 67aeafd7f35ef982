"""act_dropout in plain PyTorch: the definition, the fallback and the second derivatives.

Element i, in the order of memory of a contiguous or channels-last tensor (row-major for others), takes the word at
position offset + i of the seed's stream (common/philox.py) and is kept iff word >= round(p 2**32).
"""

import torch

from genai_fast.kernels.common import philox
from genai_fast.kernels.common.activations import activate, derivative, derivative_from_output
from genai_fast.kernels.common.channels import dense_channels, like_layout, wide


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if it is contiguous or channels-last, else a contiguous copy."""
    return dense_channels(x) if x.dim() > 1 else x.contiguous()


def _keep(x: torch.Tensor, seed: torch.Tensor, p: float, offset: int) -> torch.Tensor:
    kept = philox.words(x.numel(), seed, offset) >= philox.threshold(p)
    return kept.view(x.shape) if x.is_contiguous() else kept.view(x.movedim(1, -1).shape).movedim(-1, 1)


def act_dropout(x, seed, p, offset, activation, slope):
    """y = activate(x) keep / (1 - p); a seed of None keeps all."""
    x = dense(x)
    y = activate(wide(x), activation, slope)
    if seed is not None:
        y = torch.where(_keep(x, seed, p, offset), y * philox.scale(p), 0.0)
    y = like_layout(y.to(x.dtype), x)
    return y.clone() if y is x else y


def act_dropout_backward(grad_y, saved, seed, p, offset, from_output, activation, slope):
    """dx = dy keep / (1 - p) act'(x); `saved` is x, or y if from_output, where act(x) = (1 - p) y."""
    saved = dense(saved)
    s = wide(saved)
    if from_output:
        factor = derivative_from_output(s if seed is None else s * (1.0 - p), activation, slope)
    else:
        factor = derivative(s, activation, slope)
    dx = wide(grad_y) * factor
    if seed is not None:
        dx = torch.where(_keep(saved, seed, p, offset), dx * philox.scale(p), 0.0)
    return like_layout(dx.to(saved.dtype), saved)
