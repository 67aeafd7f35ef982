"""The settings of each recipe, with the values that its users know."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import ImageConfig, TextConfig, changed, setting


@dataclass(frozen=True)
class VAEConfig(ImageConfig):
    hidden: int = setting(400, "width of the hidden layers", low=1)
    latent: int = setting(20, "dimensions of the latent space", low=1)
    beta: float = setting(1.0, "weight of the KL term", low=0)
    likelihood: str = setting("bernoulli", "model of a pixel", choices=("bernoulli", "gaussian"))
    grid_every: int = changed(ImageConfig, "grid_every", 0)  # its epochs take less time than a grid
    quality_every: int = changed(ImageConfig, "quality_every", 0)


@dataclass(frozen=True)
class AutoencoderConfig(ImageConfig):
    latent: int = setting(128, "dimensions of the code", low=1)


@dataclass(frozen=True)
class ConvVAEConfig(ImageConfig):
    latent: int = setting(128, "dimensions of the latent space", low=1)
    beta: float = setting(1.0, "weight of the KL term", low=0)


@dataclass(frozen=True)
class GANConfig(ImageConfig):
    """What all pairs share. Rates: Radford et al. 2015."""

    lr: float = changed(ImageConfig, "lr", 2e-4)
    beta1: float = changed(ImageConfig, "beta1", 0.5)
    lr_discriminator: float = setting(0.0, "learning rate of the discriminator; 0: as --lr", low=0)
    latent: int = setting(100, "dimensions of the latent space", low=1)
    smoothing: float = setting(0.0, "label smoothing: real images count as real to the degree 1 - x", low=0, high=0.9)
    ema: float = setting(0.0, "decay of the moving average of the generator; 0: none", low=0, high=0.99999)


@dataclass(frozen=True)
class DCGANConfig(GANConfig):
    batch_size: int = changed(ImageConfig, "batch_size", 64)
    network: str = setting(
        "dcgan",
        "dcgan (28, 32, 64 or 128 pixels); dense, dense-k4: dense layer first, dropout in the discriminator",
        choices=("dcgan", "dense", "dense-k4"),
    )
    width: int = setting(64, "channels of the largest feature maps (dcgan)", low=1)
    dropout: float = setting(-1.0, "share of D's activations dropped; -1: as its authors", low=-1, high=0.9)
    spectral: bool = setting(False, "spectral norm on the discriminator's convolutions, without batch norm")


@dataclass(frozen=True)
class ConditionalGANConfig(GANConfig):
    batch_size: int = changed(ImageConfig, "batch_size", 64)
    width: int = setting(64, "channels of the largest feature maps", low=1)


@dataclass(frozen=True)
class WGANGPConfig(GANConfig):
    """Rates: Gulrajani et al. 2017."""

    lr: float = changed(ImageConfig, "lr", 1e-4)
    beta1: float = changed(ImageConfig, "beta1", 0.0)
    beta2: float = changed(ImageConfig, "beta2", 0.9)
    batch_size: int = changed(ImageConfig, "batch_size", 64)
    n_critic: int = setting(5, "updates of the critic for one of the generator", low=1)
    penalty: float = setting(10.0, "weight of the gradient penalty", low=0)
    norm: str = setting("instance", "norm in the critic", choices=("instance", "none"))
    width: int = setting(64, "channels of the largest feature maps", low=1)


@dataclass(frozen=True)
class GPTConfig(TextConfig):
    """Rates and decay: Brown et al. 2020."""

    layers: int = setting(6, "Transformer blocks", low=1)
    heads: int = setting(6, "of attention", low=1)
    width: int = setting(384, "of the hidden state", low=1)
    dropout: float = setting(0.1, "share of activations dropped", low=0, high=0.9)
    shard: bool = setting(False, "divide weights, gradients and optimizer state among the processes (FSDP2)")
    batch_size: int = changed(TextConfig, "batch_size", 16)
    epochs: int = changed(TextConfig, "epochs", 10)
    beta2: float = changed(TextConfig, "beta2", 0.95)
    weight_decay: float = changed(TextConfig, "weight_decay", 0.1)
    warmup: int = changed(TextConfig, "warmup", 100)
    decay: str = changed(TextConfig, "decay", "cosine")


@dataclass(frozen=True)
class LSTMConfig(TextConfig):
    embedding: int = setting(128, "width of a token's embedding", low=1)
    hidden: int = setting(256, "width of the LSTM's state", low=1)
    layers: int = setting(2, "LSTM layers", low=1)
    dropout: float = setting(0.0, "share of activations dropped between layers", low=0, high=0.9)
    block: int = changed(TextConfig, "block", 128)
    batch_size: int = changed(TextConfig, "batch_size", 32)


@dataclass(frozen=True)
class Seq2SeqConfig(TextConfig):
    data: str = setting(
        "pydoc", "pairs: .po catalogues, .tsv, .jsonl (source, target), a folder; or text as for gpt, to pre-train on"
    )
    layers: int = setting(4, "Transformer blocks in encoder and decoder each", low=1)
    heads: int = setting(4, "of attention", low=1)
    width: int = setting(256, "of the hidden state", low=1)
    dropout: float = setting(0.1, "share of activations dropped", low=0, high=0.9)
    batch_size: int = changed(TextConfig, "batch_size", 32)
    block: int = changed(TextConfig, "block", 128)
    warmup: int = changed(TextConfig, "warmup", 100)


@dataclass(frozen=True)
class TextVAEConfig(TextConfig):
    """Annealing and word dropout: Bowman et al. 2015."""

    embedding: int = setting(128, "width of a token's embedding", low=1)
    hidden: int = setting(256, "width of the recurrent states", low=1)
    latent: int = setting(32, "dimensions of the latent space", low=1)
    beta: float = setting(1.0, "weight of the KL term", low=0)
    annealing: int = setting(1000, "steps over which that weight rises from 0", low=0)
    word_dropout: float = setting(0.25, "share of the decoder's input tokens dropped", low=0, high=1)
    batch_size: int = changed(TextConfig, "batch_size", 32)
    block: int = changed(TextConfig, "block", 64)


@dataclass(frozen=True)
class VRNNConfig(TextConfig):
    embedding: int = setting(64, "width of a token's embedding", low=1)
    hidden: int = setting(256, "width of the recurrent state", low=1)
    latent: int = setting(32, "dimensions of each step's latent", low=1)
    beta: float = setting(1.0, "weight of the KL term", low=0)
    batch_size: int = changed(TextConfig, "batch_size", 32)
    block: int = changed(TextConfig, "block", 64)
