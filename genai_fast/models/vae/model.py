"""The variational autoencoder of one hidden layer."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.models.common import checks
from genai_fast.models.common.vae import ImageVAE


class MLPVAE(ImageVAE):
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
        self, input_size: int = 784, hidden: int = 400, latent: int = 20, *, beta: float = 1.0,
        likelihood: str = "bernoulli",
    ) -> None:  # fmt: skip
        super().__init__()
        checks.positive("MLPVAE", input_size=input_size, hidden=hidden, latent=latent)
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
        x = x.flatten(1)
        if x.shape[1] != self.input_size:
            raise ValueError(
                f"MLPVAE: expected {self.input_size} values a sample, got {x.shape[1]}; remedy: input_size={x.shape[1]}"
            )
        h = F.relu(self.fc1(x))
        # Both heads as one product of twice the columns were measured: no faster, as joining the weights costs as much.
        return self.fc21(h), self.fc22(h)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """[B, latent] -> [B, input_size]: logits (Bernoulli) or means (Gaussian)."""
        return self.fc4(F.relu(self.fc3(z)))

    def extra_repr(self) -> str:
        return f"latent={self.latent}, beta={self.beta:g}, likelihood={self.likelihood}"
