"""Generative models on the fused ops and layers."""

from collections.abc import Callable

from torch import nn

from genai_fast.models.adversarial import GAN, WGANGP, GANLosses
from genai_fast.models.autoencoder import Autoencoder
from genai_fast.models.conv_vae import ConditionalVAE, ConvVAE
from genai_fast.models.gan import (
    DCGANDiscriminator,
    DCGANGenerator,
    DenseDiscriminator,
    DenseGenerator,
    DenseGeneratorK4,
    dcgan_init,
)
from genai_fast.models.gan_conditional import ConditionalDiscriminator, ConditionalGenerator
from genai_fast.models.gan_mlp import MLPDiscriminator, MLPGenerator
from genai_fast.models.generation import Sampler, decoder_for, generate
from genai_fast.models.gpt import GPT, load_gpt2
from genai_fast.models.latents import slerp
from genai_fast.models.lstm_lm import LSTMLanguageModel
from genai_fast.models.seq2seq import Seq2Seq
from genai_fast.models.text_vae import TextVAE
from genai_fast.models.vae import MLPVAE
from genai_fast.models.vrnn import VRNN

__all__ = [
    "GAN",
    "GPT",
    "MLPVAE",
    "MODELS",
    "VRNN",
    "WGANGP",
    "Autoencoder",
    "ConditionalDiscriminator",
    "ConditionalGenerator",
    "ConditionalVAE",
    "ConvVAE",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DenseDiscriminator",
    "DenseGenerator",
    "DenseGeneratorK4",
    "GANLosses",
    "LSTMLanguageModel",
    "MLPDiscriminator",
    "MLPGenerator",
    "Sampler",
    "Seq2Seq",
    "TextVAE",
    "dcgan_init",
    "decoder_for",
    "generate",
    "load_gpt2",
    "slerp",
]

# Name on the command line -> what makes the model, and the shape of one input without the batch.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"dcgan-{s}-generator": (lambda s=s: DCGANGenerator(s), (100,)) for s in (32, 64, 128)},
    **{f"dcgan-{s}-discriminator": (lambda s=s: DCGANDiscriminator(s), (3, s, s)) for s in (32, 64, 128)},
    "dcgan-28-generator": (lambda: DCGANGenerator(28, channels=1), (100,)),
    "dcgan-28-discriminator": (lambda: DCGANDiscriminator(28, channels=1), (1, 28, 28)),
    "wgan-gp-64-critic": (lambda: DCGANDiscriminator(64, norm="instance"), (3, 64, 64)),
    "dense-generator": (DenseGenerator, (100,)),
    "dense-generator-k4": (DenseGeneratorK4, (100,)),
    "dense-discriminator": (DenseDiscriminator, (1, 28, 28)),
    "mlp-generator": (MLPGenerator, (100,)),
    "mlp-discriminator": (MLPDiscriminator, (1, 28, 28)),
    **{f"conv-vae-{s}": (lambda s=s: ConvVAE(s), (3, s, s)) for s in (64, 128, 256)},
    "conv-vae-28": (lambda: ConvVAE(28, channels=1), (1, 28, 28)),
    **{f"autoencoder-{s}": (lambda s=s: Autoencoder(s), (3, s, s)) for s in (64, 128, 256)},
    "autoencoder-28": (lambda: Autoencoder(28, channels=1), (1, 28, 28)),
}
