"""The first GAN's networks: dense layers alone. The discriminator ends in logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from genai_fast.layers import FusedSequential
from genai_fast.models import _check

_SLOPE = 0.2


class MLPGenerator(nn.Module):
    """z [B, latent] -> image [B, *shape] in [-1, 1]: Linear and ReLU to each of `widths`, Linear, tanh.

    The keys are `main.<n>.*`, n even; initialised as nn.Linear is.

    Args:
        shape: (channels, height, width) of the image.
        latent: length of z.
        widths: of the hidden layers.

    Raises: ValueError on a size below 1.
    Source: Goodfellow et al. 2014, arXiv:1406.2661.
    """

    signed: ClassVar[bool] = True

    def __init__(
        self, shape: Sequence[int] = (1, 28, 28), *, latent: int = 100, widths: Sequence[int] = (256, 512, 1024)
    ) -> None:
        super().__init__()
        self.shape, self.latent = _check.image_shape("MLPGenerator", shape), latent
        _check.positive("MLPGenerator", latent=latent, widths=min(widths, default=0))
        layers: list[nn.Module] = []
        for given, made in itertools.pairwise((latent, *widths)):
            layers += [nn.Linear(given, made), nn.ReLU(inplace=True)]
        last = nn.Linear(widths[-1], math.prod(self.shape))
        self.main = FusedSequential(*layers, last, nn.Tanh(), nn.Unflatten(1, self.shape))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z.flatten(1))


class MLPDiscriminator(nn.Module):
    """Image [B, *shape] (or flat) in [-1, 1] -> logits [B] of being real.

    Linear, LeakyReLU(0.2) and dropout to each of `widths`, then Linear to one. The keys are `main.<n>.*`, n even
    without dropout and divisible by three with it; initialised as nn.Linear is.

    Args:
        shape: (channels, height, width) of the image.
        widths: of the hidden layers.
        dropout: share of activations dropped after each LeakyReLU.

    Raises: ValueError on a size below 1, and on images of another size.
    Source: Goodfellow et al. 2014, arXiv:1406.2661.
    """

    signed: ClassVar[bool] = True

    def __init__(
        self, shape: Sequence[int] = (1, 28, 28), *, widths: Sequence[int] = (1024, 512, 256), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.shape = _check.image_shape("MLPDiscriminator", shape)
        _check.positive("MLPDiscriminator", widths=min(widths, default=0))
        layers: list[nn.Module] = []
        for given, made in itertools.pairwise((math.prod(self.shape), *widths)):
            layers += [nn.Linear(given, made), nn.LeakyReLU(_SLOPE, inplace=True)]
            layers += [nn.Dropout(dropout)] if dropout else []
        self.main = FusedSequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(_check.pixels("MLPDiscriminator", x, self.shape)).flatten()
