"""Generative models on the fused ops and layers, each loaded when it is first asked for. README.md: how to add one."""

import importlib
from typing import Any

_HOMES = {
    "autoencoder.model": "Autoencoder",
    "common.generation": "Sampler decoder_for generate",
    "common.latents": "slerp",
    "conv_vae.model": "ConditionalVAE ConvVAE",
    "gan.dcgan": "ConditionalDiscriminator ConditionalGenerator DCGANDiscriminator DCGANGenerator dcgan_init",
    "gan.dense": "DenseDiscriminator DenseGenerator DenseGeneratorK4 MLPDiscriminator MLPGenerator",
    "gan.model": "GAN GANLosses WGANGP",
    "gpt.model": "GPT load_gpt2",
    "lstm.model": "LSTMLanguageModel",
    "registry": "MODELS",
    "seq2seq.model": "Seq2Seq",
    "text_vae.model": "TextVAE",
    "vae.model": "MLPVAE",
    "vrnn.model": "VRNN",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [*sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    return found


def __dir__() -> list[str]:
    return [*globals(), *__all__]
