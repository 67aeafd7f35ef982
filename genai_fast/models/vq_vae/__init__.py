"""The VQ-VAE, and the Transformer that draws its codes."""

from genai_fast import imports

__getattr__, __dir__ = imports.on_demand(__name__, {"model": "VQVAE VQVAELosses", "prior": "VQGPT VQGPTLosses"})
