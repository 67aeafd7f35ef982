"""Fused kernels for generative models: drop-in PyTorch ops on Triton (GPU) and C++ (CPU)."""

from genai_fast import layers, ops, optim
from genai_fast.backends import FallbackWarning, use_backend
from genai_fast.cpu import tune_cpu
from genai_fast.sdpa import enable_sdpa
from genai_fast.swap import explain, fuse, unfuse
from genai_fast.versions import __version__

__all__ = [
    "FallbackWarning", "__version__", "enable_sdpa", "explain", "fuse", "layers", "ops", "optim", "tune_cpu", "unfuse",
    "use_backend",
]  # fmt: skip
