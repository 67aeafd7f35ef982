"""nn.Module drop-ins: torch's constructors and state-dict keys, with fused calls."""

from genai_fast.layers.blocks import ConvBNAct, ConvTransposeBNAct
from genai_fast.layers.norms import GroupNormAct, InstanceNormAct, LayerNorm, RMSNorm
from genai_fast.layers.recurrent import GRU
from genai_fast.layers.sequential import FusedSequential

__all__ = [
    "GRU", "ConvBNAct", "ConvTransposeBNAct", "FusedSequential", "GroupNormAct", "InstanceNormAct", "LayerNorm",
    "RMSNorm",
]  # fmt: skip
