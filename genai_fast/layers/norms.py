"""nn.LayerNorm and nn.RMSNorm that also take a residual: one pass for the sum and its norm."""

from __future__ import annotations

import torch
from torch import nn

from genai_fast import ops


def _by_row(norm: nn.LayerNorm | nn.RMSNorm, x: torch.Tensor) -> bool:
    """Whether it normalizes x's last dimension alone; else PyTorch's own serves, or says what is wrong."""
    return len(norm.normalized_shape) == 1 and x.shape[-1:] == norm.normalized_shape


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, its constructor and keys. `y = norm(x)`, or `y, h = norm(x, residual)` with h = x + residual."""

    def forward(
        self, input: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if _by_row(self, input):
            return ops.layer_norm(input, self.weight, self.bias, self.eps, residual)
        if residual is None:
            return super().forward(input)
        h = input + residual
        return super().forward(h), h


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, its constructor and keys. `y = norm(x)`, or `y, h = norm(x, residual)` with h = x + residual."""

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if _by_row(self, x):
            return ops.rms_norm(x, self.weight, self.eps, residual)
        if residual is None:
            return super().forward(x)
        h = x + residual
        return super().forward(h), h
