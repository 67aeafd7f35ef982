"""Networks and loops of CycleGAN and pix2pix as their authors write them. Critics end in numbers without a sigmoid."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class PlainResidualBlock(nn.Module):
    """x [B, width, H, W] plus two convolutions of it, with reflected borders."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width), nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv_block(x)


class PlainResNetGenerator(nn.Module):
    """Image [B, channels, H, W] -> image in [-1, 1]; H and W multiples of 4."""

    def __init__(self, channels: int = 3, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(channels, width, 7), nn.InstanceNorm2d(width), nn.ReLU(True)]
        for n in (2 * width, 4 * width):
            layers += [nn.Conv2d(n // 2, n, 3, stride=2, padding=1), nn.InstanceNorm2d(n), nn.ReLU(True)]
        layers += [PlainResidualBlock(4 * width) for _ in range(blocks)]
        for n in (2 * width, width):
            layers.append(nn.ConvTranspose2d(2 * n, n, 3, stride=2, padding=1, output_padding=1))
            layers += [nn.InstanceNorm2d(n), nn.ReLU(True)]
        self.model = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, channels, 7), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class PlainUNetGenerator(nn.Module):
    """Image [B, channels, size, size] -> image in [-1, 1]: halved while its side is even, 8 times at most, and back.

    What each half way made is joined to what comes back. Instance norm is batch norm for batches of one image.
    """

    def __init__(self, size: int = 256, channels: int = 3, width: int = 64, dropout: float = 0.5) -> None:
        super().__init__()
        depth = next((k for k in range(8) if size >> k & 1), 8)
        widths = [width * min(2**k, 8) for k in range(depth)]
        self.down = nn.ModuleList([nn.Sequential(nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2))])
        for k, (given, made) in enumerate(itertools.pairwise(widths), 2):
            conv = nn.Conv2d(given, made, 4, 2, 1)
            norm, leaky = nn.InstanceNorm2d(made, affine=True), nn.LeakyReLU(0.2)
            self.down.append(nn.Sequential(conv, nn.ReLU()) if k == depth else nn.Sequential(conv, norm, leaky))
        self.up = nn.ModuleList()
        for k, (given, made) in enumerate(itertools.pairwise(reversed(widths))):
            conv = nn.ConvTranspose2d(given * (2 if k else 1), made, 4, 2, 1)
            layers = [conv, nn.InstanceNorm2d(made, affine=True), nn.ReLU()]
            self.up.append(nn.Sequential(*layers, *([nn.Dropout(dropout)] if 0 < k < depth - 4 else [])))
        self.last = nn.Sequential(nn.ConvTranspose2d(2 * width, channels, 4, 2, 1), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        skips.pop()
        for layer in self.up:
            x = torch.cat([F.relu(skips.pop()), layer(x)], 1)
        return self.last(x)


class PlainPatchCritic(nn.Module):
    """Image [B, channels, H, W] -> a judgement of each of its patches, [B, 1, h, w]; of 3 layers they are 70 x 70."""

    def __init__(self, channels: int = 3, width: int = 64, critic_layers: int = 3, affine: bool = False) -> None:
        super().__init__()
        widths = [width * min(2**k, 8) for k in range(critic_layers + 1)]
        layers = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for k, (given, made) in enumerate(itertools.pairwise(widths), 1):
            layers.append(nn.Conv2d(given, made, 4, 2 if k < critic_layers else 1, 1))
            layers += [nn.InstanceNorm2d(made, affine=affine), nn.LeakyReLU(0.2, True)]
        self.model = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class PlainPairCritic(PlainPatchCritic):
    """Pairs of images [B, 2 channels, H, W] -> logits of their patches."""

    def __init__(self, channels: int = 3, width: int = 64, critic_layers: int = 3) -> None:
        super().__init__(2 * channels, width, critic_layers, affine=True)


class PlainImagePool:
    """Gives back generated images or, half the time once it is full, older ones."""

    def __init__(self, size: int) -> None:
        self.size, self.images = size, []

    def query(self, images: torch.Tensor) -> torch.Tensor:
        given = []
        for image in images.split(1):
            if len(self.images) < self.size:
                self.images.append(image)
            elif self.size and random.random() > 0.5:
                k = random.randrange(self.size)
                image, self.images[k] = self.images[k], image
            given.append(image)
        return torch.cat(given)


def cyclegan_step(
    networks: dict[str, nn.Module], cycle: float = 10.0, identity: float = 5.0, pool: int = 50, lr: float = 2e-4,
    device: str = "cpu",
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """The authors' loop: both generators, then both critics on images of the pools; least squares, Adam.

    Returns a function of images of both sets that takes one step and returns the losses of generators and critics.
    """
    to_b, to_a, critic_b, critic_a = (networks[n].to(device) for n in ("to_b", "to_a", "critic_b", "critic_a"))
    generators = torch.optim.Adam([*to_b.parameters(), *to_a.parameters()], lr=lr, betas=(0.5, 0.999))
    critics = torch.optim.Adam([*critic_b.parameters(), *critic_a.parameters()], lr=lr, betas=(0.5, 0.999))
    mse, l1, pools = nn.MSELoss(), nn.L1Loss(), [PlainImagePool(pool) for _ in range(2)]

    def judge(critic: nn.Module, x: torch.Tensor, real: bool) -> torch.Tensor:
        judged = critic(x)
        return mse(judged, torch.ones_like(judged) if real else torch.zeros_like(judged))

    def trained(wanted: bool) -> None:
        for p in (*critic_b.parameters(), *critic_a.parameters()):
            p.requires_grad_(wanted)

    def step(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fake_b, fake_a = to_b(a), to_a(b)
        again_a, again_b = to_a(fake_b), to_b(fake_a)
        trained(False)
        generators.zero_grad()
        loss = judge(critic_b, fake_b, True) + judge(critic_a, fake_a, True)
        loss = loss + cycle * (l1(again_a, a) + l1(again_b, b))
        if identity:
            loss = loss + identity * (l1(to_b(b), b) + l1(to_a(a), a))
        loss.backward()
        generators.step()
        trained(True)
        critics.zero_grad()
        found = []
        for critic, real, fake, kept in ((critic_b, b, fake_b, pools[0]), (critic_a, a, fake_a, pools[1])):
            loss_d = (judge(critic, real, True) + judge(critic, kept.query(fake.detach()), False)) * 0.5
            loss_d.backward()
            found.append(loss_d.detach())
        critics.step()
        return loss.detach(), found[0] + found[1]

    return step


def pix2pix_step(
    generator: nn.Module, critic: nn.Module, l1: float = 100.0, lr: float = 2e-4, device: str = "cpu"
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The authors' loop: the critic on pairs, real and made, then the generator; cross-entropy and L1, Adam.

    Returns a function of paired images that takes one step and returns the losses of generator and critic.
    """
    generator, critic, bce = generator.to(device), critic.to(device), nn.BCEWithLogitsLoss()
    adams = [torch.optim.Adam(n.parameters(), lr=lr, betas=(0.5, 0.999)) for n in (critic, generator)]

    def judge(a: torch.Tensor, b: torch.Tensor, real: bool) -> torch.Tensor:
        judged = critic(torch.cat([a, b], 1))
        return bce(judged, torch.ones_like(judged) if real else torch.zeros_like(judged))

    def step(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fake = generator(a)
        adams[0].zero_grad()
        loss_d = (judge(a, b, True) + judge(a, fake.detach(), False)) * 0.5
        loss_d.backward()
        adams[0].step()
        for p in critic.parameters():
            p.requires_grad_(False)
        adams[1].zero_grad()
        loss = judge(a, fake, True) + l1 * F.l1_loss(fake, b)
        loss.backward()
        adams[1].step()
        for p in critic.parameters():
            p.requires_grad_(True)
        return loss.detach(), loss_d.detach()

    return step
