"""The variational autoencoder of one hidden layer."""

import itertools
from collections.abc import Sequence
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
        hidden: width of the hidden layers; or of several before the code, whose weights are `fc1` and `deeper.<n>`.
        latent: dimensions of z.
        beta: weight of the KL term, >= 0.
        likelihood: "bernoulli" for data in [0, 1], or "gaussian".
        decoder_hidden: widths of the decoder's hidden layers, `fc3` and `wider.<n>`; () leaves `fc4` alone, None is
            `hidden` reversed. MLPVAE(784, (16, 8), 2, decoder_hidden=()) is 784-16-8-(2, 2)-784.

    Source: Kingma & Welling 2013, arXiv:1312.6114.
    """

    signed: ClassVar[bool] = False  # images are in [0, 1]

    def __init__(
        self, input_size: int = 784, hidden: int | Sequence[int] = 400, latent: int = 20, *, beta: float = 1.0,
        likelihood: str = "bernoulli", decoder_hidden: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        back = widths[::-1] if decoder_hidden is None else tuple(decoder_hidden)
        smallest = min(back, default=1)
        checks.positive(
            "MLPVAE", input_size=input_size, hidden=min(widths, default=0), latent=latent, decoder_hidden=smallest
        )
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"MLPVAE: likelihood: expected 'bernoulli' or 'gaussian', got {likelihood!r}")
        self.input_size, self.latent, self.beta, self.likelihood = input_size, latent, beta, likelihood
        self.fc1 = nn.Linear(input_size, widths[0])
        self.deeper = nn.ModuleList(itertools.starmap(nn.Linear, itertools.pairwise(widths)))
        self.fc21 = nn.Linear(widths[-1], latent)
        self.fc22 = nn.Linear(widths[-1], latent)
        if back:
            self.fc3 = nn.Linear(latent, back[0])
        self.wider = nn.ModuleList(itertools.starmap(nn.Linear, itertools.pairwise(back)))
        self.fc4 = nn.Linear(back[-1] if back else latent, input_size)
        self._narrow = not back

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, ...] -> mu, logvar of q(z | x), each [B, latent]."""
        x = x.flatten(1)
        if x.shape[1] != self.input_size:
            raise ValueError(
                f"MLPVAE: expected {self.input_size} values a sample, got {x.shape[1]}; remedy: input_size={x.shape[1]}"
            )
        h = F.relu(self.fc1(x))
        for layer in self.deeper:
            h = F.relu(layer(h))
        # Both heads as one product of twice the columns were measured: no faster, as joining the weights costs as much.
        return self.fc21(h), self.fc22(h)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """[B, latent] -> [B, input_size]: logits (Bernoulli) or means (Gaussian)."""
        h = z if self._narrow else F.relu(self.fc3(z))
        for layer in self.wider:
            h = F.relu(layer(h))
        return self.fc4(h)

    def extra_repr(self) -> str:
        return f"latent={self.latent}, beta={self.beta:g}, likelihood={self.likelihood}"
