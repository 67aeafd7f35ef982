"""The variational autoencoder of sentences."""

from genai_fast.models.text_vae.model import TextVAE, TextVAEDecoder  # noqa: F401
