"""Generative adversarial networks."""

from genai_fast.models.gan.dcgan import (
    ConditionalDiscriminator,
    ConditionalGenerator,
    DCGANDiscriminator,
    DCGANGenerator,
    dcgan_init,
)
from genai_fast.models.gan.dense import (
    DenseDiscriminator,
    DenseGenerator,
    DenseGeneratorK4,
    MLPDiscriminator,
    MLPGenerator,
)
from genai_fast.models.gan.model import GAN, WGANGP, GANLosses

__all__ = [
    "GAN", "WGANGP", "ConditionalDiscriminator", "ConditionalGenerator", "DCGANDiscriminator", "DCGANGenerator",
    "DenseDiscriminator", "DenseGenerator", "DenseGeneratorK4", "GANLosses", "MLPDiscriminator", "MLPGenerator",
    "dcgan_init",
]  # fmt: skip
