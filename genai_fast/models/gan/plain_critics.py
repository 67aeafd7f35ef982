"""The conditional GAN and WGAN-GP as people write them: discriminator, critic, and the loops that train the pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from genai_fast.models.gan.plain import PlainDCGANDiscriminator, PlainSelfAttention

Losses = tuple[torch.Tensor, torch.Tensor]


class PlainConditionalDiscriminator(nn.Module):
    """Image [B, channels, size, size], labels [B] -> probability [B]: the label's embedding is one more channel."""

    def __init__(
        self, classes: int = 10, size: int = 64, width: int = 64, channels: int = 3, attention: int = 0
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, size * size)
        self.main = PlainDCGANDiscriminator(size, width, channels + 1, attention).main

    def forward(self, img: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        plane = self.embed(labels).view(-1, 1, *img.shape[2:])
        return self.main(torch.cat([img, plane], dim=1)).view(-1)


class PlainCritic(nn.Module):
    """Image [B, channels, size, size] -> score [B], with instance norm or none (then with biases)."""

    def __init__(
        self, size: int = 64, width: int = 64, channels: int = 3, norm: str = "instance", attention: int = 0
    ) -> None:
        super().__init__()
        last = 7 if size == 28 else 4
        side, layers, n_in = size // 2, [], channels
        while side >= last:
            n_out = width * size // side // 2
            layers.append(nn.Conv2d(n_in, n_out, 4, 2, 1, bias=norm == "none"))
            layers += [nn.InstanceNorm2d(n_out, affine=True)] if norm == "instance" and layers[1:] else []
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            layers += [PlainSelfAttention(n_out)] if side == attention else []
            n_in, side = n_out, side // 2
        self.main = nn.Sequential(*layers, nn.Conv2d(n_in, 1, last, 1, 0, bias=False))

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return self.main(img).view(-1)


def cgan_step(
    generator: nn.Module, discriminator: nn.Module, latent: int, classes: int, device: str = "cpu"
) -> Callable[[torch.Tensor, torch.Tensor], Losses]:
    """The DCGAN example's loop with labels, those of generated images drawn at random.

    Returns a function of images and labels that takes one step and returns the losses of D and G.
    """
    generator, discriminator, bce = generator.to(device), discriminator.to(device), nn.BCELoss()
    adams = [torch.optim.Adam(n.parameters(), lr=2e-4, betas=(0.5, 0.999)) for n in (discriminator, generator)]

    def judge(x: torch.Tensor, labels: torch.Tensor, target: float) -> torch.Tensor:
        return bce(discriminator(x, labels), torch.full((len(x),), target, device=device))

    def step(x: torch.Tensor, labels: torch.Tensor) -> Losses:
        discriminator.zero_grad()
        real = judge(x, labels, 1.0)
        real.backward()
        z = torch.randn(len(x), latent, device=device)
        drawn = torch.randint(classes, (len(x),), device=device)
        fake = generator(z, drawn)
        generated = judge(fake.detach(), drawn, 0.0)
        generated.backward()
        adams[0].step()
        generator.zero_grad()
        loss = judge(fake, drawn, 1.0)
        loss.backward()
        adams[1].step()
        return real.detach() + generated.detach(), loss.detach()

    return step


def wgan_gp_step(
    generator: nn.Module, critic: nn.Module, latent: int, n_critic: int = 5, penalty: float = 10.0,
    device: str = "cpu", lr: float = 1e-4, betas: tuple[float, float] = (0.0, 0.9),
) -> Callable[[torch.Tensor], Losses]:  # fmt: skip
    """Gulrajani et al.'s algorithm: `n_critic` updates of the critic, each on its part of the images, then one of G.

    Returns a function of images that takes one step and returns the losses of the last critic's update and of G.
    """
    generator, critic = generator.to(device), critic.to(device)
    adams = [torch.optim.Adam(n.parameters(), lr=lr, betas=betas) for n in (critic, generator)]

    def slope_penalty(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        share = torch.rand(len(real), 1, 1, 1, device=device)
        between = (fake + share * (real - fake)).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        return ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()

    def step(x: torch.Tensor) -> Losses:
        for real in x.chunk(n_critic):
            critic.zero_grad()
            with torch.no_grad():
                fake = generator(torch.randn(len(real), latent, device=device))
            distance = critic(fake).mean() - critic(real).mean()
            critic_loss = distance + penalty * slope_penalty(real, fake)
            critic_loss.backward()
            adams[0].step()
        generator.zero_grad()
        loss = -critic(generator(torch.randn(len(real), latent, device=device))).mean()
        loss.backward()
        adams[1].step()
        return critic_loss.detach(), loss.detach()

    return step
