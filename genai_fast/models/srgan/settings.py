"""Super-resolution: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, Config, ImageConfig, changed, setting


@dataclass(frozen=True)
class SRResNetConfig(ImageConfig):
    """Values: Ledig et al. 2017."""

    batch_size: int = changed(Config, "batch_size", 16)
    lr: float = changed(Config, "lr", 1e-4)
    scale: int = setting(4, "factor by which pictures are enlarged, 2 or 4", low=2, high=4)
    width: int = setting(64, "channels of the feature maps", low=1)
    blocks: int = setting(16, "residual blocks of the generator", low=1)
    residual: bool = setting(
        True, "learn the difference from the bicubic image, which takes a fraction of the time; the authors do without"
    )


@dataclass(frozen=True)
class SRGANConfig(SRResNetConfig):
    decay: str = changed(Config, "decay", "linear")
    adversarial: float = setting(1e-3, "weight of the adversarial loss relative to the content loss", low=0)
    loss: str = setting("cross-entropy", "adversarial loss", choices=("cross-entropy", "hinge", "least-squares"))


SRRESNET = Command(
    "srresnet",
    "super-resolution by squared error",
    SRResNetConfig,
    ("genai-fast train srresnet --data PHOTOS --size 96 --scale 4 --flip 0.5",),
)
SRGAN = Command(
    "srgan",
    "super-resolution with a critic, begun from a run of srresnet",
    SRGANConfig,
    ("genai-fast train srgan --data PHOTOS --size 96 --scale 4 --init srresnet-PHOTOS",),
)

COMMANDS = (SRRESNET, SRGAN)
