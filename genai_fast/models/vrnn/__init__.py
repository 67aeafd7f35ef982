"""The variational recurrent network."""

from genai_fast.models.vrnn.model import VRNN, VRNNDecoder, VRNNOutput  # noqa: F401
