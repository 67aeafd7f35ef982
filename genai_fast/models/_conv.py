"""What the convolutional autoencoders share: encoder, decoder, and the shapes of both."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from genai_fast.layers import FusedSequential
from genai_fast.models import _check

_WIDTHS = (32, 64, 128, 256, 512)
_LARGEST = 8  # side of a last feature map that fewer halvings than all may leave


def _default_widths(owner: str, size: int) -> tuple[int, ...]:
    """One width a halving: five, or for small images as many as leave a whole side of at least 2."""
    halvings = 0
    while halvings < len(_WIDTHS) and size % (2 << halvings) == 0 and size >> halvings >= 4:
        halvings += 1
    if not halvings or (halvings < len(_WIDTHS) and size >> halvings > _LARGEST):
        raise ValueError(
            f"{owner}: size: expected a multiple of 32, or one that halves evenly to at most {_LARGEST} such as 28,"
            f" got {size}; resize, or pass widths"
        )
    return _WIDTHS[:halvings]


def _widths(owner: str, size: int, widths: Sequence[int] | None) -> tuple[int, ...]:
    if widths is None:
        return _default_widths(owner, size)
    _check.positive(owner, widths=min(widths, default=0))
    scale = 1 << len(widths)
    if size < scale or size % scale:
        raise ValueError(f"{owner}: size: expected a multiple of {scale}, got {size}; resize, or pass fewer widths")
    return tuple(widths)


def _block(conv: nn.Module) -> FusedSequential:
    return FusedSequential(conv, nn.BatchNorm2d(conv.out_channels), nn.LeakyReLU())


class ConvCoder(nn.Module):
    """Encoder, `heads` of [B, latent] on it, and a decoder that ends in tanh; subclasses say what they mean.

    Encoder: Conv k3 s2 p1 + batch norm + LeakyReLU for each of the widths. Decoder: Linear, then ConvTranspose k3 s2 p1
    (output padding 1) + batch norm + LeakyReLU back, Conv k3, tanh.
    """

    heads: ClassVar[tuple[str, ...]]  # names of the Linear layers on the encoder
    signed: ClassVar[bool] = True  # images are in [-1, 1]

    def __init__(
        self, size: int, channels: int, latent: int, widths: Sequence[int] | None, *, planes: int = 0, labels: int = 0
    ) -> None:
        """`planes` and `labels` come on top of what the encoder and the decoder are given."""
        super().__init__()
        owner = type(self).__name__
        _check.positive(owner, channels=channels, latent=latent)
        widths = _widths(owner, size, widths)
        side = size >> len(widths)
        self.shape, self.latent = (channels, size, size), latent
        encoder = [nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise((channels + planes, *widths))]
        self.encoder = FusedSequential(*map(_block, encoder))
        flat = widths[-1] * side * side
        for name in self.heads:
            setattr(self, name, nn.Linear(flat, latent))
        self.decoder_input = nn.Linear(latent + labels, flat)
        self.unflatten = nn.Unflatten(1, (widths[-1], side, side))
        back = (*reversed(widths), widths[0])
        decoder = [nn.ConvTranspose2d(a, b, 3, 2, 1, output_padding=1) for a, b in itertools.pairwise(back)]
        self.decoder = FusedSequential(*map(_block, decoder), nn.Conv2d(widths[0], channels, 3, 1, 1), nn.Tanh())

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What each head makes of x."""
        h = self.encoder(x).flatten(1)
        return tuple(getattr(self, name)(h) for name in self.heads)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.unflatten(self.decoder_input(z)))
