"""The variational autoencoder of one hidden layer."""

from genai_fast.models.common.vae import VAEOutput
from genai_fast.models.vae.model import MLPVAE

__all__ = ["MLPVAE", "VAEOutput"]
