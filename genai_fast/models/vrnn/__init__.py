"""The variational recurrent network."""

from genai_fast.models.vrnn.model import VRNN, VRNNDecoder, VRNNOutput

__all__ = ["VRNN", "VRNNDecoder", "VRNNOutput"]
