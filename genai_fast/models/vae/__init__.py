"""The variational autoencoder of one hidden layer."""

from genai_fast import imports

__getattr__, __dir__ = imports.on_demand(__name__, {"model": "MLPVAE", ".common.vae": "VAEOutput"})
