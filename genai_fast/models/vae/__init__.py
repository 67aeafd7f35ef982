"""The variational autoencoder of one hidden layer."""

from genai_fast.models.common.vae import VAEOutput  # noqa: F401
from genai_fast.models.vae.model import MLPVAE  # noqa: F401
