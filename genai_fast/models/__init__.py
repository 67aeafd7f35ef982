"""Generative models on the fused ops and layers, each loaded when it is first asked for. README.md: how to add one."""

from __future__ import annotations

from genai_fast import imports

_HOMES = {
    "audio_vae.model": "AudioVAE",
    "autoencoder.model": "Autoencoder",
    "common.generation": "Sampler decoder_for generate",
    "common.keras": "load_keras",
    "common.latents": "slerp",
    "common.speculation": "speculate",
    "conv_vae.model": "ConditionalVAE ConvVAE",
    "gan.dcgan": "ConditionalDiscriminator ConditionalGenerator DCGANDiscriminator DCGANGenerator dcgan_init",
    "gan.dense": "DenseDiscriminator DenseGenerator DenseGeneratorK4 KerasDiscriminator KerasDiscriminatorK4"
    " KerasGenerator KerasGeneratorK4 MLPDiscriminator MLPGenerator keras_init",
    "gan.model": "GAN GANLosses WGANGP",
    "gpt.model": "GPT load_gpt2",
    "llama.model": "Llama",
    "lstm.model": "LSTMLanguageModel",
    "registry": "MODELS",
    "seq2seq.model": "Seq2Seq",
    "srgan.model": "SRGAN SRResNet",
    "srgan.networks": "Enlarger SRCritic",
    "stylegan2.model": "StyleGAN2",
    "stylegan2.networks": "StyleDiscriminator StyleGenerator",
    "text_vae.model": "TextVAE",
    "translation.model": "CycleGAN ImagePool Pix2Pix",
    "translation.networks": "PatchCritic ResNetGenerator UNetGenerator",
    "vae.model": "MLPVAE",
    "vq_vae.model": "VQVAE",
    "vq_vae.prior": "VQGPT",
    "vrnn.model": "VRNN",
    "wavenet.decoding": "WaveNetDecoder",
    "wavenet.model": "WaveNet",
}
__all__ = sorted(" ".join(_HOMES.values()).split())
__getattr__, __dir__ = imports.on_demand(__name__, _HOMES)
