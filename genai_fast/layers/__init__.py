"""nn.Module drop-ins: the keys and the constructors of torch's own modules, one fused call for several of them."""

from genai_fast.layers.blocks import ConvBNAct, ConvTransposeBNAct
from genai_fast.layers.norms import LayerNorm, RMSNorm
from genai_fast.layers.recurrent import GRU
from genai_fast.layers.sequential import FusedSequential

__all__ = ["GRU", "ConvBNAct", "ConvTransposeBNAct", "FusedSequential", "LayerNorm", "RMSNorm"]
