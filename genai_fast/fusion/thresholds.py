"""From which size on a fused call beats PyTorch's own modules on a CPU: below it the call itself costs more.

Measured on two AVX-512 cores with `pytest bench/bench_layers.py` at many sizes; elements of the output unless said.
"""

from __future__ import annotations

import torch
from torch import nn

NORM_TRAINING = {2: 1 << 18}  # by number of dimensions
NORM_TRAINING_PLANES = 1 << 17
NORM_EVALUATION = 1 << 21  # an activation that works in place on what the cache holds is hard to beat
DROPOUT = 1 << 13
FOLD = 1 << 21
PATH = 1 << 22  # multiplications: a choice of path costs 20 us
RECURRENCE = 8  # steps
RMS_NORM = 1 << 17


def norm(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether batch norm of x, with the activation behind it, is to be one call."""
    if not x.is_cpu or torch.compiler.is_compiling() or type(module) is nn.SyncBatchNorm:  # torch's refuses CPUs
        return True
    if module.training:
        return x.numel() >= NORM_TRAINING.get(x.dim(), NORM_TRAINING_PLANES)
    return x.numel() >= NORM_EVALUATION


def dropout(x: torch.Tensor) -> bool:
    """Whether dropout of x, with the activation before it, is to be one call."""
    return not x.is_cpu or torch.compiler.is_compiling() or x.numel() >= DROPOUT


def path(conv: nn.Module, x: torch.Tensor) -> bool:
    """Whether to look for the fastest path of a convolution of x, or to fold a norm into it."""
    if not x.is_cpu:
        return True
    work = x.numel() * (conv.weight.numel() // conv.in_channels)
    if type(conv) is nn.Conv2d:
        work //= conv.stride[0] * conv.stride[1]
    return work >= PATH


def recurrence(x: torch.Tensor, steps: int) -> bool:
    """Whether a layer over that many steps of the sequence x is to be one call, which first packs the weights."""
    return not x.is_cpu or torch.compiler.is_compiling() or steps >= RECURRENCE


def rms_norm(x: torch.Tensor) -> bool:
    """Whether RMS norm of x is to be one call, which it is not in PyTorch."""
    return not x.is_cpu or x.numel() >= RMS_NORM
