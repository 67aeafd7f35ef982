"""Models as their authors write them in plain PyTorch: the peers of speed figures; weights load both ways.

Discriminators end in a sigmoid, for nn.BCELoss; ours end in logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class EagerMLPVAE(nn.Module):
    """The VAE of PyTorch's own examples: the decoder ends in a sigmoid, the loss is summed BCE plus KL.

    With likelihood "gaussian" there is no sigmoid, and squared error in place of BCE. Train it with
    `torch.optim.Adam(model.parameters(), lr=1e-3)` on `loss(x)`.
    """

    def __init__(
        self, input_size: int = 784, hidden: int = 400, latent: int = 20, likelihood: str = "bernoulli"
    ) -> None:
        super().__init__()
        self.input_size, self.likelihood = input_size, likelihood
        self.fc1 = nn.Linear(input_size, hidden)
        self.fc21 = nn.Linear(hidden, latent)
        self.fc22 = nn.Linear(hidden, latent)
        self.fc3 = nn.Linear(latent, hidden)
        self.fc4 = nn.Linear(hidden, input_size)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        h3 = F.relu(self.fc3(z))
        out = self.fc4(h3)
        return torch.sigmoid(out) if self.likelihood == "bernoulli" else out

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mu, logvar = self.encode(x.view(-1, self.input_size))
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """The negative ELBO, summed over the batch."""
        recon_x, mu, logvar = self(x)
        error = F.binary_cross_entropy if self.likelihood == "bernoulli" else F.mse_loss
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return error(recon_x, x.view(-1, self.input_size), reduction="sum") + kld


class EagerMLPGenerator(nn.Module):
    """z [B, latent] -> image [B, *shape]: the MLP of many a first GAN."""

    def __init__(
        self, shape: tuple[int, ...] = (1, 28, 28), latent: int = 100, widths: tuple[int, ...] = (256, 512, 1024)
    ) -> None:
        super().__init__()
        self.shape = shape
        layers = []
        for n_in, n_out in zip((latent, *widths), widths, strict=False):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.main = nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(shape)), nn.Tanh())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        img = self.main(z)
        return img.view(img.size(0), *self.shape)


class EagerMLPDiscriminator(nn.Module):
    """Image [B, *shape] -> probability [B]."""

    def __init__(
        self, shape: tuple[int, ...] = (1, 28, 28), widths: tuple[int, ...] = (1024, 512, 256), dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers = []
        for n_in, n_out in zip((math.prod(shape), *widths), widths, strict=False):
            layers += [nn.Linear(n_in, n_out), nn.LeakyReLU(0.2)]
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.main = nn.Sequential(*layers, nn.Linear(widths[-1], 1), nn.Sigmoid())

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return self.main(img.view(img.size(0), -1)).squeeze(1)


class EagerDCGANGenerator(nn.Module):
    """z [B, nz] or [B, nz, 1, 1] -> image [B, nc, size, size], the layers of PyTorch's DCGAN example.

    size is 28, 32, 64 or 128.
    """

    def __init__(self, nz: int = 100, ngf: int = 64, nc: int = 3, size: int = 64) -> None:
        super().__init__()
        side = 7 if size == 28 else 4
        channels = ngf * size // side // 2
        layers = [nn.ConvTranspose2d(nz, channels, side, 1, 0, bias=False), nn.BatchNorm2d(channels), nn.ReLU(True)]
        while channels > ngf:
            layers += [
                nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(channels // 2),
                nn.ReLU(True),
            ]
            channels //= 2
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z.view(z.size(0), -1, 1, 1))


class EagerDCGANDiscriminator(nn.Module):
    """Image [B, nc, 64, 64] -> probability [B], the layers of PyTorch's DCGAN example."""

    def __init__(self, ndf: int = 64, nc: int = 3) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(nc, ndf, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 4),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return self.main(img).view(-1)


class EagerDenseGenerator(nn.Module):
    """z [B, latent] -> image [B, channels, 4 side, 4 side], by way of a dense layer."""

    def __init__(self, latent: int = 100, channels: int = 1, side: int = 7, momentum: float = 0.2) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Linear(latent, side * side * 256, bias=False),
            nn.BatchNorm1d(side * side * 256, momentum=momentum),
            nn.LeakyReLU(0.2),
            nn.Unflatten(1, (256, side, side)),
            nn.ConvTranspose2d(256, 128, 5, stride=1, padding=2, bias=False),
            nn.BatchNorm2d(128, momentum=momentum),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(128, 64, 5, stride=2, padding=2, output_padding=1, bias=False),
            nn.BatchNorm2d(64, momentum=momentum),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(64, channels, 5, stride=2, padding=2, output_padding=1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)


class EagerDenseGeneratorK4(nn.Module):
    """z [B, latent] -> image [B, channels, 4 side, 4 side], by way of a dense layer, with kernels of 4 and no norms."""

    def __init__(self, latent: int = 100, channels: int = 1, side: int = 7) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Linear(latent, 128 * side * side),
            nn.LeakyReLU(0.2),
            nn.Unflatten(1, (128, side, side)),
            nn.ConvTranspose2d(128, 128, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(128, 128, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(128, channels, 7, padding=3),
            nn.Tanh(),
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)


class EagerDenseDiscriminator(nn.Module):
    """Image [B, channels, size, size] -> probability [B]."""

    def __init__(self, size: int = 28, channels: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, 64, 5, stride=2, padding=2),
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
            nn.Conv2d(64, 128, 5, stride=2, padding=2),
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(128 * (size // 4) ** 2, 1),
            nn.Sigmoid(),
        )

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return self.main(img).squeeze(1)


def conv_encoder(channels: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Images [B, channels, H, W] -> feature maps of half the side for each width."""
    modules, n_in = [], channels
    for n_out in widths:
        conv = nn.Conv2d(n_in, n_out, kernel_size=3, stride=2, padding=1)
        modules.append(nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.LeakyReLU()))
        n_in = n_out
    return nn.Sequential(*modules)


def conv_decoder(channels: int, widths: tuple[int, ...]) -> nn.Sequential:
    """The way back, to images [B, channels, H, W] in [-1, 1]."""
    modules, n_in = [], widths[-1]
    for n_out in (*widths[-2::-1], widths[0]):
        conv = nn.ConvTranspose2d(n_in, n_out, kernel_size=3, stride=2, padding=1, output_padding=1)
        modules.append(nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.LeakyReLU()))
        n_in = n_out
    return nn.Sequential(*modules, nn.Conv2d(n_in, channels, kernel_size=3, padding=1), nn.Tanh())


class EagerConvVAE(nn.Module):
    """Images [B, channels, size, size] in [-1, 1]; the loss is summed squared error plus KL, a mean over the batch."""

    def __init__(
        self, size: int = 64, channels: int = 3, latent: int = 128, widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    ) -> None:
        super().__init__()
        self.widths, self.side = widths, size >> len(widths)
        flat = widths[-1] * self.side**2
        self.encoder = conv_encoder(channels, widths)
        self.fc_mu = nn.Linear(flat, latent)
        self.fc_logvar = nn.Linear(flat, latent)
        self.decoder_input = nn.Linear(latent, flat)
        self.decoder = conv_decoder(channels, widths)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.flatten(self.encoder(x), start_dim=1)
        return self.fc_mu(h), self.fc_logvar(h)

    def reparameterize(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.decoder_input(z).view(-1, self.widths[-1], self.side, self.side))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """The negative ELBO, the mean over the batch."""
        recon_x, mu, logvar = self(x)
        error = F.mse_loss(recon_x, x, reduction="sum")
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (error + kld) / x.size(0)


class EagerAutoencoder(nn.Module):
    """Images [B, channels, size, size] in [-1, 1] -> a code [B, latent] -> images; the loss is summed squared error."""

    def __init__(
        self, size: int = 64, channels: int = 3, latent: int = 128, widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    ) -> None:
        super().__init__()
        self.widths, self.side = widths, size >> len(widths)
        flat = widths[-1] * self.side**2
        self.encoder = conv_encoder(channels, widths)
        self.fc = nn.Linear(flat, latent)
        self.decoder_input = nn.Linear(latent, flat)
        self.decoder = conv_decoder(channels, widths)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(self.encoder(x), start_dim=1))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.decoder_input(z).view(-1, self.widths[-1], self.side, self.side))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over the batch."""
        return F.mse_loss(self(x), x, reduction="sum") / x.size(0)


RunStep = Callable[[torch.Tensor], Any]


def gan_step(generator: nn.Module, discriminator: nn.Module, latent: int, device: str = "cpu") -> RunStep:
    """The loop of PyTorch's DCGAN example for z [B, latent]: D on real and on generated images, then G; BCE, Adam.

    Returns a function of images that takes one step and returns the losses of D and G.
    """
    generator, discriminator, bce = generator.to(device), discriminator.to(device), nn.BCELoss()
    adams = [torch.optim.Adam(n.parameters(), lr=2e-4, betas=(0.5, 0.999)) for n in (discriminator, generator)]

    def judge(x: torch.Tensor, target: float) -> torch.Tensor:
        return bce(discriminator(x), torch.full((len(x),), target, device=device))

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        discriminator.zero_grad()
        real = judge(x, 1.0)
        real.backward()
        z = torch.randn(len(x), latent, device=device)
        fake = generator(z)
        generated = judge(fake.detach(), 0.0)
        generated.backward()
        adams[0].step()
        generator.zero_grad()
        loss = judge(fake, 1.0)
        loss.backward()
        adams[1].step()
        return real.detach() + generated.detach(), loss.detach()

    return step


def vae_step(model: nn.Module, device: str = "cpu") -> RunStep:
    """zero_grad, loss, backward, step; returns a function of images that does it and returns the loss."""
    model = model.to(device)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(x: torch.Tensor) -> torch.Tensor:
        adam.zero_grad()
        loss = model.loss(x)
        loss.backward()
        adam.step()
        return loss.detach()

    return step
