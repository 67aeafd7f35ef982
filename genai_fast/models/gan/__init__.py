"""Generative adversarial networks."""

from genai_fast import imports

_HOMES = {
    "dcgan": "ConditionalDiscriminator ConditionalGenerator DCGANDiscriminator DCGANGenerator dcgan_init",
    "dense": "DenseDiscriminator DenseGenerator DenseGeneratorK4 KerasDiscriminator KerasDiscriminatorK4 KerasGenerator"
    " KerasGeneratorK4 MLPDiscriminator MLPGenerator keras_init",
    "model": "GAN WGANGP GANLosses",
}
__getattr__, __dir__ = imports.on_demand(__name__, _HOMES)
