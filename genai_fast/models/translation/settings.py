"""Image-to-image translation: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, Config, TranslationConfig, changed, setting


@dataclass(frozen=True)
class _GANConfig(TranslationConfig):
    """What both share. Values: Isola et al. 2017 and Zhu et al. 2017."""

    batch_size: int = changed(Config, "batch_size", 1)
    lr: float = changed(Config, "lr", 2e-4)
    beta1: float = changed(Config, "beta1", 0.5)
    decay: str = changed(Config, "decay", "linear")
    epochs: int = changed(Config, "epochs", 200)
    width: int = setting(64, "channels of the largest feature maps of generators and critics", low=1)
    critic_layers: int = setting(
        3, "strided convolutions of a critic: 3 judge patches of 70 x 70 pixels, 2 of 34, 1 of 16", low=1, high=6
    )


@dataclass(frozen=True)
class CycleGANConfig(_GANConfig):
    blocks: int = setting(0, "residual blocks of a generator; 0: 9 from 256 pixels on, else 6", low=0)
    cycle: float = setting(10.0, "weight of the cycle loss", low=0)
    identity: float = setting(5.0, "weight of the identity loss; 0: none, which is faster", low=0)
    pool: int = setting(50, "generated images that are kept to be judged again; 0: none", low=0)


@dataclass(frozen=True)
class Pix2PixConfig(_GANConfig):
    l1: float = setting(100.0, "weight of the L1 distance to the partner", low=0)
    loss: str = setting("cross-entropy", "adversarial loss", choices=("cross-entropy", "hinge", "least-squares"))
    dropout: float = setting(0.5, "dropout probability in the generator's inner layers", low=0, high=0.9)


CYCLEGAN = Command(
    "cyclegan",
    "translation between two sets of pictures without pairs",
    CycleGANConfig,
    (
        "genai-fast train cyclegan --data HORSES --data-b ZEBRAS --size 128",
        "genai-fast train cyclegan --data mnist --data-b digits --size 32 --width 12 --blocks 2 --epochs 9",
    ),
)
PIX2PIX = Command(
    "pix2pix",
    "translation learned from pairs of pictures",
    Pix2PixConfig,
    ("genai-fast train pix2pix --data MAPS --data-b PHOTOS --size 256 --flip 0.5",),
)

COMMANDS = (CYCLEGAN, PIX2PIX)
