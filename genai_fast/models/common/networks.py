"""Fused networks from the plain ones of `plain.py`."""

from __future__ import annotations

from torch import nn

from genai_fast.layers import FusedSequential


def fused(layers: nn.Sequential) -> FusedSequential:
    """The same modules, nested ones too, in `FusedSequential`s."""
    return FusedSequential(*(fused(layer) if type(layer) is nn.Sequential else layer for layer in layers))
