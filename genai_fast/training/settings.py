"""The settings of each recipe, with the values that its users know."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.training.config import Config, changed, setting


@dataclass(frozen=True)
class VAEConfig(Config):
    hidden: int = setting(400, "width of the hidden layers", low=1)
    latent: int = setting(20, "dimensions of the latent space", low=1)
    beta: float = setting(1.0, "weight of the KL term", low=0)
    likelihood: str = setting("bernoulli", "model of a pixel", choices=("bernoulli", "gaussian"))
    grid_every: int = changed(Config, "grid_every", 0)  # its epochs take less time than a grid
    quality_every: int = changed(Config, "quality_every", 0)


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    latent: int = setting(128, "dimensions of the code", low=1)


@dataclass(frozen=True)
class ConvVAEConfig(Config):
    latent: int = setting(128, "dimensions of the latent space", low=1)
    beta: float = setting(1.0, "weight of the KL term", low=0)


@dataclass(frozen=True)
class GANConfig(Config):
    """What all pairs share. Rates: Radford et al. 2015."""

    lr: float = changed(Config, "lr", 2e-4)
    beta1: float = changed(Config, "beta1", 0.5)
    lr_discriminator: float = setting(0.0, "learning rate of the discriminator; 0: as --lr", low=0)
    latent: int = setting(100, "dimensions of the latent space", low=1)
    smoothing: float = setting(0.0, "label smoothing: real images count as real to the degree 1 - x", low=0, high=0.9)
    ema: float = setting(0.0, "decay of the moving average of the generator; 0: none", low=0, high=0.99999)


@dataclass(frozen=True)
class DCGANConfig(GANConfig):
    batch_size: int = changed(Config, "batch_size", 64)
    network: str = setting(
        "dcgan", "dcgan (28, 32, 64 or 128 pixels); dense, dense-k4: dense layer first, dropout in the discriminator",
        choices=("dcgan", "dense", "dense-k4"),
    )  # fmt: skip
    width: int = setting(64, "channels of the largest feature maps (dcgan)", low=1)
    dropout: float = setting(-1.0, "share of D's activations dropped; -1: as its authors", low=-1, high=0.9)
    spectral: bool = setting(False, "spectral norm on the discriminator's convolutions, without batch norm")


@dataclass(frozen=True)
class ConditionalGANConfig(GANConfig):
    batch_size: int = changed(Config, "batch_size", 64)
    width: int = setting(64, "channels of the largest feature maps", low=1)


@dataclass(frozen=True)
class WGANGPConfig(GANConfig):
    """Rates: Gulrajani et al. 2017."""

    lr: float = changed(Config, "lr", 1e-4)
    beta1: float = changed(Config, "beta1", 0.0)
    beta2: float = changed(Config, "beta2", 0.9)
    batch_size: int = changed(Config, "batch_size", 64)
    n_critic: int = setting(5, "updates of the critic for one of the generator", low=1)
    penalty: float = setting(10.0, "weight of the gradient penalty", low=0)
    norm: str = setting("instance", "norm in the critic", choices=("instance", "none"))
    width: int = setting(64, "channels of the largest feature maps", low=1)
