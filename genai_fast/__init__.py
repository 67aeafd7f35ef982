"""Fused kernels for generative models: drop-in PyTorch ops on Triton (GPU) and C++ (CPU)."""

from genai_fast import ops
from genai_fast.backends import FallbackWarning, use_backend

__version__ = "0.1.0"
__all__ = ["FallbackWarning", "__version__", "ops", "use_backend"]
