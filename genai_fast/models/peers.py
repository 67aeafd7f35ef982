"""Models as their authors write them in plain PyTorch: the peers of speed figures; weights load both ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class EagerMLPVAE(nn.Module):
    """The VAE of PyTorch's own examples: the decoder ends in a sigmoid, the loss is summed BCE plus KL.

    Train it with `torch.optim.Adam(model.parameters(), lr=1e-3)` on `loss(x)`.
    """

    def __init__(self, input_size: int = 784, hidden: int = 400, latent: int = 20) -> None:
        super().__init__()
        self.input_size = input_size
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
        return torch.sigmoid(self.fc4(h3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mu, logvar = self.encode(x.view(-1, self.input_size))
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """The negative ELBO, summed over the batch."""
        recon_x, mu, logvar = self(x)
        bce = F.binary_cross_entropy(recon_x, x.view(-1, self.input_size), reduction="sum")
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return bce + kld
