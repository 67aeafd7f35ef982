"""Convolutional variational autoencoders."""

from genai_fast.models.conv_vae.model import ConditionalVAE, ConvVAE  # noqa: F401
