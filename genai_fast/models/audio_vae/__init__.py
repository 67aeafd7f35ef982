"""Convolutional variational autoencoder of sounds."""

from genai_fast import imports

__getattr__, __dir__ = imports.on_demand(__name__, {"model": "AudioVAE"})
