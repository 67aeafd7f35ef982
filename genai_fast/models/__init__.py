"""Generative models on the fused ops."""

from genai_fast.models.vae import MLPVAE

__all__ = ["MLPVAE"]
