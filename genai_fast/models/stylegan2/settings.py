"""StyleGAN2: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, ImageConfig, changed, setting


@dataclass(frozen=True)
class StyleGAN2Config(ImageConfig):
    """Values: Karras et al. 2020."""

    batch_size: int = changed(ImageConfig, "batch_size", 16)
    lr: float = changed(ImageConfig, "lr", 2e-3)
    beta1: float = changed(ImageConfig, "beta1", 0.0)
    beta2: float = changed(ImageConfig, "beta2", 0.99)
    lr_discriminator: float = setting(0.0, "learning rate of the discriminator; 0: that of --lr", low=0)
    latent: int = setting(256, "dimensions of the latent space, and of a style", low=1)
    layers: int = setting(8, "dense layers from a latent to a style", low=1)
    width: int = setting(32, "channels of the largest feature maps; half the side, twice as many, up to 512", low=1)
    gamma: float = setting(1.0, "weight of R1, the penalty of the discriminator's gradient at real images", low=0)
    path: float = setting(2.0, "weight of the path length regularisation; 0: none", low=0)
    mixing: float = setting(0.9, "probability of an image with two styles in training", low=0, high=1)
    ema: float = setting(0.999, "decay of the generator's exponential moving average; 0: none", low=0, high=0.99999)


STYLEGAN2 = Command(
    "stylegan2",
    "style-based GAN with R1 and path length regularisation",
    StyleGAN2Config,
    (
        "genai-fast train stylegan2 --data PHOTOS --size 64 --flip 0.5",
        "genai-fast train stylegan2 --data digits --size 32 --width 8 --latent 64 --layers 4",
    ),
)

COMMANDS = (STYLEGAN2,)
