"""Generative adversarial networks."""

from genai_fast.models.gan.dcgan import (  # noqa: F401
    ConditionalDiscriminator,
    ConditionalGenerator,
    DCGANDiscriminator,
    DCGANGenerator,
    dcgan_init,
)
from genai_fast.models.gan.dense import (  # noqa: F401
    DenseDiscriminator,
    DenseGenerator,
    DenseGeneratorK4,
    MLPDiscriminator,
    MLPGenerator,
)
from genai_fast.models.gan.model import GAN, WGANGP, GANLosses  # noqa: F401
