"""The convolutional autoencoder."""

from genai_fast.models.autoencoder.model import Autoencoder, AutoencoderLoss  # noqa: F401
