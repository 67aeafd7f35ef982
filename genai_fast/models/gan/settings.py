"""Generative adversarial networks: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, ImageConfig, changed, setting


@dataclass(frozen=True)
class GANConfig(ImageConfig):
    """What all pairs share. Rates: Radford et al. 2015."""

    lr: float = changed(ImageConfig, "lr", 2e-4)
    beta1: float = changed(ImageConfig, "beta1", 0.5)
    lr_discriminator: float = setting(0.0, "learning rate of the discriminator; 0: that of --lr", low=0)
    latent: int = setting(100, "dimensions of the latent space", low=1)
    smoothing: float = setting(0.0, "one-sided label smoothing: target 1 - x for real images", low=0, high=0.9)
    ema: float = setting(0.0, "decay of the generator's exponential moving average; 0: none", low=0, high=0.99999)
    diff_augment: str = setting(
        "", "change images on their way to the discriminator: color, translation, cutout, or several with commas"
    )


_SPECTRAL = "spectral norm instead of batch norm in the discriminator"
_ATTENTION = "side of the feature map with self-attention in both networks (dcgan); 0: none"


@dataclass(frozen=True)
class MLPGANConfig(GANConfig):
    """What GANs with a discriminator have against collapse and instability."""

    loss: str = setting("cross-entropy", "adversarial loss", choices=("cross-entropy", "hinge", "least-squares"))
    r1: float = setting(0.0, "weight of the penalty on the discriminator's gradient at real images; 0: none", low=0)
    adapt: float = setting(
        0.0,
        "accuracy that the discriminator's learning rate keeps it at, such as 0.8; 0: a fixed rate",
        low=0,
        high=0.99,
    )


@dataclass(frozen=True)
class DCGANConfig(MLPGANConfig):
    batch_size: int = changed(ImageConfig, "batch_size", 64)
    network: str = setting(
        "dcgan",
        "dcgan (28, 32, 64 or 128 pixels); dense, dense-k4: dense layer first, dropout in the discriminator; keras,"
        " keras-k4: the same of Keras' listings, exactly",
        choices=("dcgan", "dense", "dense-k4", "keras", "keras-k4"),
    )
    width: int = setting(64, "channels of the largest feature maps (dcgan)", low=1)
    dropout: float = setting(
        -1.0, "dropout probability in the discriminator; -1: that of its authors", low=-1, high=0.9
    )
    spectral: bool = setting(False, _SPECTRAL)
    attention: int = setting(0, _ATTENTION, low=0)


@dataclass(frozen=True)
class ConditionalGANConfig(MLPGANConfig):
    batch_size: int = changed(ImageConfig, "batch_size", 64)
    width: int = setting(64, "channels of the largest feature maps", low=1)
    spectral: bool = setting(False, _SPECTRAL)
    attention: int = setting(0, _ATTENTION, low=0)


@dataclass(frozen=True)
class WGANGPConfig(GANConfig):
    """Rates: Gulrajani et al. 2017."""

    lr: float = changed(ImageConfig, "lr", 1e-4)
    beta1: float = changed(ImageConfig, "beta1", 0.0)
    beta2: float = changed(ImageConfig, "beta2", 0.9)
    batch_size: int = changed(ImageConfig, "batch_size", 64)
    n_critic: int = setting(5, "critic updates per generator update", low=1)
    penalty: float = setting(10.0, "weight of the gradient penalty", low=0)
    norm: str = setting("instance", "norm in the critic", choices=("instance", "none"))
    width: int = setting(64, "channels of the largest feature maps", low=1)
    attention: int = setting(0, _ATTENTION, low=0)


MLP_GAN = Command(
    "mlp-gan",
    "generative adversarial network of dense layers",
    MLPGANConfig,
    ("genai-fast train mlp-gan --data mnist --smoothing 0.1",),
)
DCGAN = Command(
    "dcgan",
    "deep convolutional GAN",
    DCGANConfig,
    (
        "genai-fast train dcgan --data PHOTOS --size 64 --flip 0.5 --ema 0.999",
        "genai-fast train dcgan --data mnist --network keras --lr 1e-4 --beta1 0.9 --batch-size 128",
        "genai-fast train dcgan --data PHOTOS --size 64 --loss hinge --spectral --attention 16 --adapt 0.8",
    ),
)
CGAN = Command(
    "cgan",
    "conditional DCGAN, for labelled images",
    ConditionalGANConfig,
    (
        "genai-fast train cgan --data mnist --width 32",
        "genai-fast train cgan --data PHOTOS --size 64 --r1 1 --diff-augment color,translation,cutout",
    ),
)
WGAN_GP = Command(
    "wgan-gp",
    "Wasserstein GAN with gradient penalty",
    WGANGPConfig,
    ("genai-fast train wgan-gp --data cifar-10-batches-py --n-critic 5 --penalty 10",),
)

COMMANDS = (MLP_GAN, DCGAN, CGAN, WGAN_GP)
