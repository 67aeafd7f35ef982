"""The VAE of PyTorch's own examples."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.models.common.plain_vae import PlainVAE


class PlainMLPVAE(PlainVAE, nn.Module):
    """The decoder ends in a sigmoid, the loss is summed BCE plus KL.

    With likelihood "gaussian" there is no sigmoid, and squared error in place of BCE. Train it with
    `torch.optim.Adam(model.parameters(), lr=1e-3)` on `loss(x)`.
    """

    def __init__(
        self, input_size: int = 784, hidden: int | tuple[int, ...] = 400, latent: int = 20,
        likelihood: str = "bernoulli", decoder_hidden: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        back = widths[::-1] if decoder_hidden is None else tuple(decoder_hidden)
        self.input_size, self.likelihood = input_size, likelihood
        self.fc1 = nn.Linear(input_size, widths[0])
        self.deeper = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
        self.fc21 = nn.Linear(widths[-1], latent)
        self.fc22 = nn.Linear(widths[-1], latent)
        if back:
            self.fc3 = nn.Linear(latent, back[0])
        self.wider = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(back)])
        self.fc4 = nn.Linear(back[-1] if back else latent, input_size)
        self.narrow = not back

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h1 = F.relu(self.fc1(x))
        for layer in self.deeper:
            h1 = F.relu(layer(h1))
        return self.fc21(h1), self.fc22(h1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        h3 = z if self.narrow else F.relu(self.fc3(z))
        for layer in self.wider:
            h3 = F.relu(layer(h3))
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
        return error(recon_x, x.view(-1, self.input_size), reduction="sum") + self.kl(mu, logvar)
