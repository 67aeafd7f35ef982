"""Generators and discriminators of generative adversarial networks. Discriminators end in logits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from genai_fast.layers import FusedSequential

_STARTS = {28: 7, 32: 4, 64: 4, 128: 4}  # side of the image -> side of the first feature map
_SLOPE = 0.2


def _positive(owner: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{owner}: {name}: expected at least 1, got {value}")


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
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)
    return model


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

    def __init__(self, size: int = 64, *, latent: int = 100, width: int = 64, channels: int = 3) -> None:
        super().__init__()
        start, doublings = _start("DCGANGenerator", size)
        _positive("DCGANGenerator", latent=latent, width=width, channels=channels)
        self.latent = latent
        widths = [width << k for k in reversed(range(doublings))]
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent, widths[0], start, 1, 0, bias=False)]
        for given, made in zip(widths, [*widths[1:], channels], strict=True):
            layers += [nn.BatchNorm2d(given), nn.ReLU(True), nn.ConvTranspose2d(given, made, 4, 2, 1, bias=False)]
        self.main = FusedSequential(*layers, nn.Tanh())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z.reshape(z.size(0), self.latent, 1, 1))


class DCGANDiscriminator(nn.Module):
    """Image [B, channels, size, size] in [-1, 1] -> logits [B] of being real.

    Conv k4 s2 p1 with batch norm (not the first) and LeakyReLU(0.2) down to 4 (7 for 28) pixels, then Conv to one.
    The keys are `main.<n>.*`, as in PyTorch's DCGAN example, without its last sigmoid.

    Args:
        size: 28, 32, 64 or 128.
        width: channels of the first feature map; each one after has twice as many.
        channels: of the image.
        dropout: share of activations dropped after each LeakyReLU.

    Source: Radford, Metz & Chintala 2015, arXiv:1511.06434.
    """

    def __init__(self, size: int = 64, *, width: int = 64, channels: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        start, halvings = _start("DCGANDiscriminator", size)
        _positive("DCGANDiscriminator", width=width, channels=channels)
        widths = [channels, *(width << k for k in range(halvings))]
        layers: list[nn.Module] = []
        for k, (given, made) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Conv2d(given, made, 4, 2, 1, bias=False))
            layers += [nn.BatchNorm2d(made)] if k else []
            layers.append(nn.LeakyReLU(_SLOPE, inplace=True))
            layers += [nn.Dropout(dropout)] if dropout else []
        self.main = FusedSequential(*layers, nn.Conv2d(widths[-1], 1, start, 1, 0, bias=False))

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

    def __init__(self, latent: int = 100, *, channels: int = 1, side: int = 7, momentum: float = 0.2) -> None:
        super().__init__()
        _positive("DenseGenerator", latent=latent, channels=channels, side=side)
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

    def __init__(self, latent: int = 100, *, channels: int = 1, side: int = 7) -> None:
        super().__init__()
        _positive("DenseGeneratorK4", latent=latent, channels=channels, side=side)
        self.main = FusedSequential(
            nn.Linear(latent, 128 * side * side), nn.LeakyReLU(_SLOPE, inplace=True),
            nn.Unflatten(1, (128, side, side)),
            nn.ConvTranspose2d(128, 128, 4, 2, 1), nn.LeakyReLU(_SLOPE, inplace=True),
            nn.ConvTranspose2d(128, 128, 4, 2, 1), nn.LeakyReLU(_SLOPE, inplace=True),
            nn.Conv2d(128, channels, 7, 1, 3), nn.Tanh(),
        )  # fmt: skip

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

    def __init__(
        self, size: int = 28, *, channels: int = 1, widths: Sequence[int] = (64, 128), dropout: float = 0.3
    ) -> None:
        super().__init__()
        _positive("DenseDiscriminator", size=size, channels=channels)
        if size % 4:
            raise ValueError(f"DenseDiscriminator: size: expected a multiple of 4, got {size}; resize the images")
        layers: list[nn.Module] = []
        for given, made in zip((channels, *widths), widths, strict=False):
            layers += [nn.Conv2d(given, made, 5, 2, 2), nn.LeakyReLU(_SLOPE, inplace=True), nn.Dropout(dropout)]
        flat = widths[-1] * (size >> len(widths)) ** 2
        self.main = FusedSequential(*layers, nn.Flatten(), nn.Linear(flat, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x).flatten()
