"""Convolutional variational autoencoder of log-mel spectrograms in [-1, 1]: the loss is squared error plus KL."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.models.common.plain_vae import PlainVAE


class PlainAudioCoder(nn.Module):
    """The networks, along the frames of [B, mels, frames]; the mel bands are the channels.

    Encoder: for each of the widths Conv1d, stride 2, [batch norm,] ReLU; then the frames that are left as one vector, a
    dense layer with ReLU if there are `hidden` units, and `fc_mu`, `fc_logvar`. Decoder: the same back, by
    ConvTranspose1d of twice the length; what goes beyond `frames` is cut off by a last Conv1d to the mel bands.
    """

    def __init__(
        self, mels: int = 128, frames: int = 32, latent: int = 32, widths: tuple[int, ...] = (128, 256, 512),
        hidden: int = 0, kernel: int = 3, norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        left, side, back = frames, kernel // 2, (*reversed(widths), widths[0])
        for _ in widths:
            left = (left + 1) // 2
        flat = widths[-1] * left

        def block(conv: nn.Module) -> nn.Sequential:
            return nn.Sequential(conv, *([nn.BatchNorm1d(conv.out_channels)] if norm else []), nn.ReLU())

        def dense(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(a, b), nn.ReLU())

        down = [nn.Conv1d(a, b, kernel, 2, side) for a, b in itertools.pairwise((mels, *widths))]
        self.encoder = nn.Sequential(*map(block, down), nn.Flatten(), *([dense(flat, hidden)] if hidden else []))
        self.fc_mu = nn.Linear(hidden or flat, latent)
        self.fc_logvar = nn.Linear(hidden or flat, latent)
        first = [dense(latent, hidden), dense(hidden, flat)] if hidden else [nn.Linear(latent, flat)]
        up = [nn.ConvTranspose1d(a, b, kernel, 2, side, output_padding=1) for a, b in itertools.pairwise(back)]
        self.decoder = nn.Sequential(*first, nn.Unflatten(1, (widths[-1], left)), *map(block, up))
        self.last = nn.Conv1d(widths[0], mels, kernel, 1, side)
        self.frames = frames

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, mels, frames] -> mu, logvar of q(z | x), each [B, latent]."""
        h = self.encoder(x)
        return self.fc_mu(h), self.fc_logvar(h)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """[B, latent] -> means of p(x | z), [B, mels, frames]."""
        return self.last(self.decoder(z))[..., : self.frames]


class PlainAudioVAE(PlainVAE, PlainAudioCoder):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """The negative ELBO, the mean over the batch."""
        recon_x, mu, logvar = self(x)
        return (F.mse_loss(recon_x, x, reduction="sum") + self.kl(mu, logvar)) / x.size(0)
