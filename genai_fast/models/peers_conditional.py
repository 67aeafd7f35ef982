"""Models that are told a class, as their authors write them in plain PyTorch; weights load both ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.models.peers import EagerDCGANGenerator, conv_decoder, conv_encoder


class EagerConditionalGenerator(nn.Module):
    """z [B, nz], labels [B] -> image [B, nc, size, size]: DCGAN's layers on z and the label's embedding."""

    def __init__(
        self, classes: int = 10, nz: int = 100, ngf: int = 64, nc: int = 3, size: int = 64, embedding: int = 100
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, embedding)
        self.main = EagerDCGANGenerator(nz + embedding, ngf, nc, size).main

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.main(torch.cat([z, self.embed(labels)], dim=1)[:, :, None, None])


class EagerConditionalVAE(nn.Module):
    """Images [B, channels, size, size] in [-1, 1] and labels [B]; the loss is the mean negative ELBO of an image.

    The encoder sees the label's embedding as one more channel, the decoder its one-hot vector beside z.
    """

    def __init__(
        self,
        classes: int = 10,
        size: int = 64,
        channels: int = 3,
        latent: int = 128,
        widths: tuple[int, ...] = (32, 64, 128, 256, 512),
    ) -> None:
        super().__init__()
        self.classes, self.widths, self.side = classes, widths, size >> len(widths)
        flat = widths[-1] * self.side**2
        self.encoder = conv_encoder(channels + 1, widths)
        self.fc_mu = nn.Linear(flat, latent)
        self.fc_logvar = nn.Linear(flat, latent)
        self.decoder_input = nn.Linear(latent + classes, flat)
        self.decoder = conv_decoder(channels, widths)
        self.embed = nn.Embedding(classes, size * size)

    def encode(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plane = self.embed(labels).view(-1, 1, x.size(2), x.size(3))
        h = torch.flatten(self.encoder(torch.cat([x, plane], dim=1)), start_dim=1)
        return self.fc_mu(h), self.fc_logvar(h)

    def reparameterize(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        one_hot = F.one_hot(labels, self.classes).to(z.dtype)
        h = self.decoder_input(torch.cat([z, one_hot], dim=1))
        return self.decoder(h.view(-1, self.widths[-1], self.side, self.side))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mu, logvar = self.encode(x, labels)
        z = self.reparameterize(mu, logvar)
        return self.decode(z, labels), mu, logvar

    def loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The negative ELBO, the mean over the batch."""
        recon_x, mu, logvar = self(x, labels)
        error = F.mse_loss(recon_x, x, reduction="sum")
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (error + kld) / x.size(0)
