"""nn.LayerNorm and nn.RMSNorm in one call, that also take a residual: one pass for the sum and its norm."""

from typing import Any

import torch
from torch import nn

from genai_fast import ops
from genai_fast.backends import choose, forced_backend, is_plain
from genai_fast.fusion import thresholds
from genai_fast.fusion.classes import replaced_forward
from genai_fast.ops.dispatch import left_to_torch
from genai_fast.precision import autocast_dtype


def _is_ours(norm: nn.LayerNorm | nn.RMSNorm, x: Any, residual: Any) -> bool:
    """Whether the op takes these and is worth its call; else PyTorch's own serves, or says what is wrong."""
    if not is_plain(x) or len(norm.normalized_shape) != 1 or x.shape[-1:] != norm.normalized_shape or left_to_torch():
        return False
    kind, weight = x.device.type, norm.weight
    mixed = autocast_dtype(kind) is not None
    if weight is not None and (weight.device != x.device or (weight.dtype is not x.dtype and not mixed)):
        return False
    if residual is not None and (not is_plain(residual) or residual.shape != x.shape):
        return False
    if torch.compiler.is_compiling():
        return x.dtype is not torch.float64
    # One library op serves both norms.
    if choose("layer_norm", forced_backend(), kind, x.dtype)[1]:
        return False
    if residual is not None or forced_backend():
        return True
    # PyTorch's layer norm is one call too, and no slower. Of channels_last, its RMS norm keeps the layout.
    return isinstance(norm, nn.RMSNorm) and (x.dim() < 4 or x.is_contiguous()) and not thresholds.rms_norm(x)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, its constructor and keys. `y = norm(x)`, or `y, h = norm(x, residual)` with h = x + residual."""

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if _is_ours(self, input, residual):
            return ops.layer_norm(input, self.weight, self.bias, self.eps, residual)
        if residual is None:
            return super().forward(input)
        h = input + residual
        return super().forward(h), h


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, its constructor and keys. `y = norm(x)`, or `y, h = norm(x, residual)` with h = x + residual."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if (now := replaced_forward(self)) is not None:
            return now(self, x)
        if _is_ours(self, x, residual):
            return ops.rms_norm(x, self.weight, self.eps, residual)
        if residual is None:
            return super().forward(x)
        h = x + residual
        return super().forward(h), h
