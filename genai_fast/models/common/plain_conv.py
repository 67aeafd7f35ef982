"""The networks of the convolutional autoencoders in plain PyTorch; `common.conv` makes the fused ones of them."""

import itertools

import torch
from torch import nn


class HalfTurn(nn.Module):
    """Images [B, C, H, W] turned by 180 degrees.

    Where a stride leaves an odd number of pixels to pad, Keras' padding "same" puts the odd one at the right and the
    bottom, PyTorch's at the left and the top. So Keras' network is PyTorch's on turned images with turned kernels.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(2, 3)


def conv_block(conv: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.LeakyReLU())


class PlainConvCoder(nn.Module):
    """An encoder with the linear layers `heads` on it, and the decoder back to images in [-1, 1].

    Encoder: Conv k3 s2 p1 + batch norm + LeakyReLU for each of the widths. Decoder: Linear, then ConvTranspose k3 s2 p1
    (output padding 1) + batch norm + LeakyReLU back, Conv k3, tanh. `planes` and `labels` are added to the channels
    that the encoder reads and to the numbers that the decoder reads.
    """

    heads: tuple[str, ...] = ("fc_mu", "fc_logvar")

    def __init__(
        self, size: int = 64, channels: int = 3, latent: int = 128,
        widths: tuple[int, ...] = (32, 64, 128, 256, 512), planes: int = 0, labels: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        side, back = size >> len(widths), (*reversed(widths), widths[0])
        flat = widths[-1] * side * side
        down = [nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise((channels + planes, *widths))]
        self.encoder = nn.Sequential(*map(conv_block, down))
        for name in self.heads:
            setattr(self, name, nn.Linear(flat, latent))
        self.decoder_input = nn.Linear(latent + labels, flat)
        self.unflatten = nn.Unflatten(1, (widths[-1], side, side))
        up = [nn.ConvTranspose2d(a, b, 3, 2, 1, output_padding=1) for a, b in itertools.pairwise(back)]
        self.decoder = nn.Sequential(*map(conv_block, up), nn.Conv2d(widths[0], channels, 3, 1, 1), nn.Tanh())

    def coded(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each head's [B, latent] of images [B, channels + planes, size, size]."""
        h = self.encoder(x).flatten(1)
        return tuple(getattr(self, name)(h) for name in self.heads)

    def decoded(self, z: torch.Tensor) -> torch.Tensor:
        """[B, latent + labels] -> [B, channels, size, size]."""
        return self.decoder(self.unflatten(self.decoder_input(z)))
