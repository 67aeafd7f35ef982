"""Fused networks from the plain ones of `plain.py`."""

from typing import ClassVar

import torch
from torch import nn

from genai_fast.layers import FusedSequential


class ImageNetwork(nn.Module):
    """A network `main` that makes or judges images in [-1, 1]."""

    signed: ClassVar[bool] = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x)


def fused(layers: nn.Sequential) -> FusedSequential:
    """The same modules, nested ones too, in `FusedSequential`s."""
    return FusedSequential(*(fused(layer) if type(layer) is nn.Sequential else layer for layer in layers))
