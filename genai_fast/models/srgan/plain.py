"""SRResNet, SRGAN's critic, and the loop that trains both, as their authors describe them; images are in [-1, 1]."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def lowered(x: torch.Tensor, scale: int) -> torch.Tensor:
    """Images [B, C, H, W] as small ones, [B, C, H / scale, W / scale]: bicubic, antialiased."""
    size = [side // scale for side in x.shape[2:]]
    return F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)


def enlarged(x: torch.Tensor, scale: int) -> torch.Tensor:
    """Images [B, C, H, W] enlarged bicubically: [B, C, scale H, scale W]."""
    return F.interpolate(x, scale_factor=float(scale), mode="bicubic", align_corners=False)


class PlainSRBlock(nn.Module):
    """x [B, width, H, W] plus two normed convolutions of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.main(x)


class PlainEnlarger(nn.Module):
    """SRResNet's generator: [B, channels, H, W] -> [B, channels, scale H, scale W]; scale is 2 or 4.

    residual: it makes the difference from the bicubically enlarged image.
    """

    def __init__(
        self, scale: int = 4, channels: int = 3, width: int = 64, blocks: int = 16, residual: bool = True
    ) -> None:
        super().__init__()
        self.scale, self.residual = scale, residual
        self.first = nn.Sequential(nn.Conv2d(channels, width, 9, 1, 4), nn.PReLU())
        self.blocks = nn.Sequential(
            *(PlainSRBlock(width) for _ in range(blocks)),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        layers = []
        for _ in range(scale.bit_length() - 1):
            layers += [nn.Conv2d(width, 4 * width, 3, 1, 1), nn.PixelShuffle(2), nn.PReLU()]
        self.last = nn.Sequential(*layers, nn.Conv2d(width, channels, 9, 1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        y = self.last(h + self.blocks(h))
        return y + enlarged(x, self.scale) if self.residual else y

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """The mean squared error of large images made of small ones."""
        return F.mse_loss(self(lowered(x, self.scale)), x)


class PlainSRCritic(nn.Module):
    """Image [B, channels, size, size] -> logits [B]."""

    def __init__(self, size: int = 96, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        layers = [nn.Conv2d(channels, width, 3, 1, 1), nn.LeakyReLU(0.2)]
        widths = [width << (k // 2) for k in range(8)]
        for k, (given, made) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(given, made, 3, 1 if k % 2 else 2, 1, bias=False), nn.BatchNorm2d(made)]
            layers.append(nn.LeakyReLU(0.2))
        flat, wide = widths[-1] * math.ceil(size / 16) ** 2, 16 * width
        self.main = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, wide), nn.LeakyReLU(0.2), nn.Linear(wide, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x).squeeze(1)


def srgan_step(
    generator: nn.Module,
    critic: nn.Module,
    scale: int,
    adversarial: float = 1e-3,
    lr: float = 1e-4,
    device: str = "cpu",
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The critic on large images, real and made, then the generator by content and adversarial loss; Adam.

    Returns a function of large images that takes one step and returns the losses of generator and critic.
    """
    generator, critic, bce = generator.to(device), critic.to(device), nn.BCEWithLogitsLoss()
    adams = [torch.optim.Adam(n.parameters(), lr=lr) for n in (critic, generator)]

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made, ones, zeros = generator(lowered(x, scale)), x.new_ones(len(x)), x.new_zeros(len(x))
        adams[0].zero_grad()
        loss_d = bce(critic(x), ones) + bce(critic(made.detach()), zeros)
        loss_d.backward()
        adams[0].step()
        adams[1].zero_grad()
        loss = F.mse_loss(made, x) + adversarial * bce(critic(made), ones)
        loss.backward()
        adams[1].step()
        return loss.detach(), loss_d.detach()

    return step
