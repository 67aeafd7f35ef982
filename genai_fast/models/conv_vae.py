"""The convolutional variational autoencoder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from genai_fast import ops
from genai_fast.layers import FusedSequential
from genai_fast.models.vae import VAEOutput


def _block(conv: nn.Module) -> FusedSequential:
    return FusedSequential(conv, nn.BatchNorm2d(conv.out_channels), nn.LeakyReLU())


class ConvVAE(nn.Module):
    """Images [B, channels, size, size] in [-1, 1], one Gaussian latent [B, latent], a decoder that ends in tanh.

    Encoder: Conv k3 s2 p1 + batch norm + LeakyReLU for each of `widths`; Linear heads for mu and logvar. Decoder:
    Linear, then ConvTranspose k3 s2 p1 (output padding 1) + batch norm + LeakyReLU back, Conv k3, tanh. The likelihood
    is Gaussian of unit variance.

    Args:
        size: side of the image: a multiple of 2 ** len(widths), such as 64, 128 or 256.
        channels: of the image.
        latent: dimensions of z.
        widths: channels of the encoder's feature maps.
        beta: weight of the KL term, >= 0.

    Source: Kingma & Welling 2013, arXiv:1312.6114; beta: Higgins et al. 2017.
    """

    def __init__(
        self, size: int = 64, *, channels: int = 3, latent: int = 128,
        widths: Sequence[int] = (32, 64, 128, 256, 512), beta: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        scale = 1 << len(widths)
        if size < scale or size % scale:
            raise ValueError(f"ConvVAE: size: expected a multiple of {scale}, got {size}; resize, or pass fewer widths")
        for name, value in (("channels", channels), ("latent", latent), *(("widths", w) for w in widths)):
            if value < 1:
                raise ValueError(f"ConvVAE: {name}: expected at least 1, got {value}")
        self.shape, self.latent, self.beta = (channels, size, size), latent, beta
        widths, side = list(widths), size // scale
        encoder = [nn.Conv2d(a, b, 3, 2, 1) for a, b in zip([channels, *widths], widths, strict=False)]
        self.encoder = FusedSequential(*map(_block, encoder))
        flat = widths[-1] * side * side
        self.fc_mu, self.fc_logvar = nn.Linear(flat, latent), nn.Linear(flat, latent)
        self.decoder_input = nn.Linear(latent, flat)
        self.unflatten = nn.Unflatten(1, (widths[-1], side, side))
        back = [*reversed(widths), widths[0]]
        decoder = [nn.ConvTranspose2d(a, b, 3, 2, 1, output_padding=1) for a, b in itertools.pairwise(back)]
        self.decoder = FusedSequential(*map(_block, decoder), nn.Conv2d(widths[0], channels, 3, 1, 1), nn.Tanh())

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, channels, size, size] -> mu, logvar of q(z | x), each [B, latent]."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"ConvVAE: expected images [B, {', '.join(map(str, self.shape))}], got {tuple(x.shape)}")
        h = self.encoder(x).flatten(1)
        return self.fc_mu(h), self.fc_logvar(h)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """[B, latent] -> means of p(x | z), [B, channels, size, size]."""
        return self.decoder(self.unflatten(self.decoder_input(z)))

    def forward(self, x: torch.Tensor, *, seed: int | torch.Tensor | None = None) -> VAEOutput:
        """One pass through encoder, a draw of z, and decoder; `seed` as for `ops.reparameterize`."""
        mu, logvar = self.encode(x)
        return VAEOutput(self.decode(ops.reparameterize(mu, logvar, seed=seed)), mu, logvar)

    def training_step(self, x: torch.Tensor) -> ops.VAELoss:
        """The negative ELBO of a batch and its terms: 0-d float32, means over the batch, in nats."""
        recon, mu, logvar = self(x)
        return ops.vae_loss(recon.flatten(1), x.flatten(1), mu, logvar, likelihood="gaussian", beta=self.beta)

    @torch.no_grad()
    def sample(self, count: int, *, seed: int | None = None) -> torch.Tensor:
        """Means of p(x | z) for z ~ N(0, I), [count, channels, size, size]; a seed gives the same z everywhere."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self.decode(torch.randn(count, self.latent, generator=generator).to(self.fc_mu.weight))

    @torch.no_grad()
    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Means of p(x | z = mu(x)), in the shape of x."""
        return self.decode(self.encode(x)[0])

    def extra_repr(self) -> str:
        return f"size={self.shape[-1]}, latent={self.latent}, beta={self.beta:g}"
