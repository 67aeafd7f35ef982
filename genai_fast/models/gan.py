"""Generators and discriminators of generative adversarial networks. Discriminators end in logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from genai_fast.layers import FusedSequential
from genai_fast.models import _check

_STARTS = {28: 7, 32: 4, 64: 4, 128: 4}  # side of the image -> side of the first feature map
_SLOPE = 0.2
_NORMS: dict[str, Callable[[int], list[nn.Module]]] = {
    "batch": lambda channels: [nn.BatchNorm2d(channels)],
    "instance": lambda channels: [nn.InstanceNorm2d(channels, affine=True)],
    "none": lambda channels: [],
}
_POWER_ITERATIONS = 15  # as many as spectral_norm begins with


def _start(owner: str, size: int) -> tuple[int, int]:
    """Side of the first feature map, and how often it is doubled."""
    if size not in _STARTS:
        raise ValueError(
            f"{owner}: size: expected one of {', '.join(map(str, _STARTS))}, got {size}; resize the images"
        )
    return _STARTS[size], (size // _STARTS[size]).bit_length() - 1


def dcgan_init(model: nn.Module) -> nn.Module:
    """Initialise as DCGAN's authors do, in place: weights N(0, 0.02), those of norms N(1, 0.02), norms' biases 0."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            if parametrize.is_parametrized(module, "weight"):
                _init_spectral(module)
            else:
                nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)
    return model


@torch.no_grad()
def _init_spectral(conv: nn.Module) -> None:
    """A new weight has new singular vectors; each look at the weight in training is one power iteration to them."""
    nn.init.normal_(conv.parametrizations.weight.original, 0.0, 0.02)
    training = conv.training
    conv.train()
    for _ in range(_POWER_ITERATIONS):
        _ = conv.weight
    conv.train(training)


def generator(owner: str, size: int, latent: int, width: int, channels: int) -> FusedSequential:
    """DCGAN's: [B, latent, 1, 1] -> [B, channels, size, size]."""
    start, doublings = _start(owner, size)
    _check.positive(owner, latent=latent, width=width, channels=channels)
    widths = [width << k for k in reversed(range(doublings))]
    layers: list[nn.Module] = [nn.ConvTranspose2d(latent, widths[0], start, 1, 0, bias=False)]
    for given, made in zip(widths, [*widths[1:], channels], strict=True):
        layers += [nn.BatchNorm2d(given), nn.ReLU(True), nn.ConvTranspose2d(given, made, 4, 2, 1, bias=False)]
    return FusedSequential(*layers, nn.Tanh())


def discriminator(
    owner: str, size: int, width: int, channels: int, *, dropout: float, norm: str, spectral: bool
) -> FusedSequential:
    """DCGAN's: [B, channels, size, size] -> logits [B, 1, 1, 1]."""
    start, halvings = _start(owner, size)
    _check.positive(owner, width=width, channels=channels)
    if norm not in _NORMS:
        raise ValueError(f"{owner}: norm: expected one of {', '.join(map(repr, _NORMS))}, got {norm!r}")
    wrapped = spectral_norm if spectral else lambda conv: conv
    widths = [channels, *(width << k for k in range(halvings))]
    layers: list[nn.Module] = []
    for k, (given, made) in enumerate(itertools.pairwise(widths)):
        layers.append(wrapped(nn.Conv2d(given, made, 4, 2, 1, bias=norm == "none")))
        layers += _NORMS[norm](made) if k else []
        layers.append(nn.LeakyReLU(_SLOPE, inplace=True))
        layers += [nn.Dropout(dropout)] if dropout else []
    return FusedSequential(*layers, wrapped(nn.Conv2d(widths[-1], 1, start, 1, 0, bias=False)))


class DCGANGenerator(nn.Module):
    """z [B, latent] or [B, latent, 1, 1] -> image [B, channels, size, size] in [-1, 1].

    ConvTranspose k4 s1 (k7 for 28 pixels), then ConvTranspose k4 s2 p1 up to `size`, with batch norm and ReLU between.
    The keys are `main.<n>.*`, as in PyTorch's DCGAN example, whose 64-pixel checkpoints load.

    Args:
        size: 28, 32, 64 or 128.
        latent: length of z.
        width: channels of the last feature map; each one before has twice as many.
        channels: of the image.

    Source: Radford, Metz & Chintala 2015, arXiv:1511.06434.
    """

    signed: ClassVar[bool] = True

    def __init__(self, size: int = 64, *, latent: int = 100, width: int = 64, channels: int = 3) -> None:
        super().__init__()
        self.main = generator("DCGANGenerator", size, latent, width, channels)
        self.latent = latent

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z.reshape(z.size(0), self.latent, 1, 1))


class DCGANDiscriminator(nn.Module):
    """Image [B, channels, size, size] in [-1, 1] -> logits [B] of being real; also the critic of WGAN-GP.

    Conv k4 s2 p1 with batch norm (not the first) and LeakyReLU(0.2) down to 4 (7 for 28) pixels, then Conv to one.
    The keys are `main.<n>.*`, as in PyTorch's DCGAN example, without its last sigmoid.

    WGAN-GP needs `norm` "instance" or "none": its penalty is on the gradient of each sample's score, and batch norm
    makes a score depend on the other samples (Gulrajani et al. 2017, section 4). The output is differentiable twice.

    Args:
        size: 28, 32, 64 or 128.
        width: channels of the first feature map; each one after has twice as many.
        channels: of the image.
        dropout: share of activations dropped after each LeakyReLU.
        norm: "batch", "instance" (affine) or "none", where the convolutions have biases instead.
        spectral: divide each convolution's weight by its largest singular value; the keys are then those of
            `torch.nn.utils.parametrizations.spectral_norm`.

    Raises: ValueError on what is none of these.
    Source: Radford, Metz & Chintala 2015, arXiv:1511.06434; WGAN-GP: Gulrajani et al. 2017, arXiv:1704.00028; spectral
        norm: Miyato et al. 2018, arXiv:1802.05957.
    """

    signed: ClassVar[bool] = True

    def __init__(
        self, size: int = 64, *, width: int = 64, channels: int = 3, dropout: float = 0.0, norm: str = "batch",
        spectral: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        settings = {"dropout": dropout, "norm": norm, "spectral": spectral}
        self.main = discriminator("DCGANDiscriminator", size, width, channels, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x).flatten()


class DenseGenerator(nn.Module):
    """z [B, latent] -> image [B, channels, 4 side, 4 side] in [-1, 1], by way of a dense layer.

    Linear -> [256, side, side], batch norm, LeakyReLU -> ConvTranspose k5 s1 to 128, k5 s2 to 64, each with batch norm
    and LeakyReLU -> ConvTranspose k5 s2 to the image, tanh.

    Args:
        latent: length of z.
        channels: of the image.
        side: of the first feature map: 7 for images of 28 pixels.
        momentum: of the norms, in PyTorch's sense.
    """

    signed: ClassVar[bool] = True

    def __init__(self, latent: int = 100, *, channels: int = 1, side: int = 7, momentum: float = 0.2) -> None:
        super().__init__()
        _check.positive("DenseGenerator", latent=latent, channels=channels, side=side)
        self.latent = latent
        dense = 256 * side * side
        self.main = FusedSequential(
            nn.Linear(latent, dense, bias=False), nn.BatchNorm1d(dense, momentum=momentum), nn.LeakyReLU(_SLOPE),
            nn.Unflatten(1, (256, side, side)),
            nn.ConvTranspose2d(256, 128, 5, 1, 2, bias=False), nn.BatchNorm2d(128, momentum=momentum),
            nn.LeakyReLU(_SLOPE),
            nn.ConvTranspose2d(128, 64, 5, 2, 2, 1, bias=False), nn.BatchNorm2d(64, momentum=momentum),
            nn.LeakyReLU(_SLOPE),
            nn.ConvTranspose2d(64, channels, 5, 2, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)


class DenseGeneratorK4(nn.Module):
    """z [B, latent] -> image [B, channels, 4 side, 4 side] in [-1, 1]: no norms.

    Linear -> [128, side, side], LeakyReLU -> twice ConvTranspose k4 s2 p1 to 128, LeakyReLU -> Conv k7, tanh.
    """

    signed: ClassVar[bool] = True

    def __init__(self, latent: int = 100, *, channels: int = 1, side: int = 7) -> None:
        super().__init__()
        _check.positive("DenseGeneratorK4", latent=latent, channels=channels, side=side)
        self.latent = latent
        self.main = FusedSequential(
            nn.Linear(latent, 128 * side * side),
            nn.LeakyReLU(_SLOPE, inplace=True),
            nn.Unflatten(1, (128, side, side)),
            nn.ConvTranspose2d(128, 128, 4, 2, 1),
            nn.LeakyReLU(_SLOPE, inplace=True),
            nn.ConvTranspose2d(128, 128, 4, 2, 1),
            nn.LeakyReLU(_SLOPE, inplace=True),
            nn.Conv2d(128, channels, 7, 1, 3),
            nn.Tanh(),
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)


class DenseDiscriminator(nn.Module):
    """Image [B, channels, size, size] -> logits [B]: two Conv k5 s2 p2 with LeakyReLU and dropout, then Linear.

    Args:
        size: of the image, a multiple of 4.
        channels: of the image.
        widths: channels of the two feature maps.
        dropout: share of activations dropped.
    """

    signed: ClassVar[bool] = True

    def __init__(
        self, size: int = 28, *, channels: int = 1, widths: Sequence[int] = (64, 128), dropout: float = 0.3
    ) -> None:
        super().__init__()
        _check.positive("DenseDiscriminator", size=size, channels=channels)
        if size % 4:
            raise ValueError(f"DenseDiscriminator: size: expected a multiple of 4, got {size}; resize the images")
        layers: list[nn.Module] = []
        for given, made in zip((channels, *widths), widths, strict=False):
            layers += [nn.Conv2d(given, made, 5, 2, 2), nn.LeakyReLU(_SLOPE, inplace=True), nn.Dropout(dropout)]
        flat = widths[-1] * (size >> len(widths)) ** 2
        self.main = FusedSequential(*layers, nn.Flatten(), nn.Linear(flat, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x).flatten()
