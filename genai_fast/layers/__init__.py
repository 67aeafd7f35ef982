"""nn.Module drop-ins: torch's constructors and state-dict keys, with fused calls."""

from genai_fast.layers.attention import MultiheadAttention
from genai_fast.layers.blocks import ConvBNAct, ConvTransposeBNAct
from genai_fast.layers.losses import BCELoss, CrossEntropyLoss, LinearCrossEntropyLoss, VAELoss
from genai_fast.layers.modulated import ModulatedConv2d
from genai_fast.layers.norms import GroupNormAct, InstanceNormAct, LayerNorm, RMSNorm
from genai_fast.layers.parts import GEGLU, CausalConv1d, Dropout, Reparameterize, SwiGLU, UpsampleConv2d
from genai_fast.layers.quantizer import VectorQuantizer
from genai_fast.layers.recurrent import GRU, LSTM
from genai_fast.layers.sequential import FusedSequential

__all__ = [
    "GEGLU", "GRU", "LSTM", "BCELoss", "CausalConv1d", "ConvBNAct", "ConvTransposeBNAct", "CrossEntropyLoss", "Dropout",
    "FusedSequential", "GroupNormAct", "InstanceNormAct", "LayerNorm", "LinearCrossEntropyLoss", "ModulatedConv2d",
    "MultiheadAttention", "RMSNorm", "Reparameterize", "SwiGLU", "UpsampleConv2d", "VAELoss", "VectorQuantizer",
]  # fmt: skip
