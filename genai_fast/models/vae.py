"""Variational autoencoders."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import ops
from genai_fast.models import latents


class VAEOutput(NamedTuple):
    recon: torch.Tensor  # decoder output [B, input_size]: logits (Bernoulli) or means (Gaussian)
    mu: torch.Tensor  # [B, latent]
    logvar: torch.Tensor  # [B, latent]


class MLPVAE(nn.Module):
    """The VAE of one hidden layer: x -> fc1 -> relu -> (fc21, fc22) -> z -> fc3 -> relu -> fc4.

    Its parameters have the names of the well-known PyTorch example, so weights load both ways. Its decoder
    ends in logits: the sigmoid is part of the loss, and of what `sample` and `reconstruct` return.

    Args:
        input_size: pixels (times channels) of an image.
        hidden: width of the hidden layers.
        latent: dimensions of z.
        beta: weight of the KL term, >= 0.
        likelihood: "bernoulli" for data in [0, 1], or "gaussian".

    Source: Kingma & Welling 2013, arXiv:1312.6114.
    """

    signed: ClassVar[bool] = False  # images are in [0, 1]

    def __init__(
        self,
        input_size: int = 784,
        hidden: int = 400,
        latent: int = 20,
        *,
        beta: float = 1.0,
        likelihood: str = "bernoulli",
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden", hidden), ("latent", latent)):
            if value < 1:
                raise ValueError(f"MLPVAE: {name}: expected at least 1, got {value}")
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"MLPVAE: likelihood: expected 'bernoulli' or 'gaussian', got {likelihood!r}")
        self.input_size, self.latent, self.beta, self.likelihood = input_size, latent, beta, likelihood
        self.fc1 = nn.Linear(input_size, hidden)
        self.fc21 = nn.Linear(hidden, latent)
        self.fc22 = nn.Linear(hidden, latent)
        self.fc3 = nn.Linear(latent, hidden)
        self.fc4 = nn.Linear(hidden, input_size)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, ...] -> mu, logvar of q(z | x), each [B, latent]."""
        h = F.relu(self.fc1(self._flat(x)))
        # Both heads as one product of twice the columns were measured: no faster, as joining the weights costs as much.
        return self.fc21(h), self.fc22(h)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """[B, latent] -> [B, input_size]: logits (Bernoulli) or means (Gaussian)."""
        return self.fc4(F.relu(self.fc3(z)))

    def forward(self, x: torch.Tensor, *, seed: int | torch.Tensor | None = None) -> VAEOutput:
        """One pass through encoder, a draw of z, and decoder; `seed` as for `ops.reparameterize`."""
        mu, logvar = self.encode(x)
        return VAEOutput(self.decode(ops.reparameterize(mu, logvar, seed=seed)), mu, logvar)

    def training_step(self, x: torch.Tensor) -> ops.VAELoss:
        """The negative ELBO of a batch [B, ...] and its terms: 0-d float32, means over the batch, in nats."""
        recon, mu, logvar = self(x)
        return ops.vae_loss(recon, self._flat(x), mu, logvar, likelihood=self.likelihood, beta=self.beta)

    @torch.no_grad()
    def sample(self, count: int, *, seed: int | None = None) -> torch.Tensor:
        """Means of p(x | z) for z ~ N(0, I), [count, input_size]; a seed gives the same z on every device."""
        return self._mean(self.decode(latents.normal(count, self.latent, seed).to(self.fc3.weight)))

    @torch.no_grad()
    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Means of p(x | z = mu(x)), in the shape of x."""
        return self._mean(self.decode(self.encode(x)[0])).view(x.shape)

    @torch.no_grad()
    def interpolate(self, a: torch.Tensor, b: torch.Tensor, steps: int) -> torch.Tensor:
        """Images [...] a and b -> [steps, ...]: decoded from the line mu(a) to mu(b), both included."""
        z = latents.line(*self.encode(torch.stack([a, b]))[0], steps)
        return self._mean(self.decode(z)).view(-1, *a.shape)

    def inpaint(
        self, x: torch.Tensor, mask: torch.Tensor, *, steps: int = 200, lr: float = 0.05, seed: int | None = None
    ) -> torch.Tensor:
        """Repair x [B, C, H, W] where mask [B, 1, H, W] is True; see `latents.inpaint`.

        The weights and their gradients stay as they are.
        """
        settings = {"likelihood": self.likelihood, "steps": steps, "lr": lr, "seed": seed}
        return latents.inpaint(self.encode, self.decode, x, mask, **settings)

    def extra_repr(self) -> str:
        return f"latent={self.latent}, beta={self.beta:g}, likelihood={self.likelihood}"

    def _mean(self, recon: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(recon) if self.likelihood == "bernoulli" else recon

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        if x.shape[1] != self.input_size:
            raise ValueError(
                f"MLPVAE: expected {self.input_size} values a sample, got {x.shape[1]}; remedy: input_size={x.shape[1]}"
            )
        return x
