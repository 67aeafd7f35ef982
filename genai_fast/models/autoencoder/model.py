"""The convolutional autoencoder: ConvVAE's networks without sampling."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch

from genai_fast import ops
from genai_fast.models.common import checks, latents
from genai_fast.models.common.conv import ConvCoder


class AutoencoderLoss(NamedTuple):
    loss: torch.Tensor  # 0-d float32


class Autoencoder(ConvCoder):
    """Images [B, channels, size, size] in [-1, 1] -> a code [B, latent] -> images, by the networks of `ConvVAE`.

    Args:
        latent: length of the code.
        size, channels, widths: as of `ConvVAE`.

    Raises: ValueError on sizes that do not fit, and on images of another shape.
    Source: Hinton & Salakhutdinov 2006, doi:10.1126/science.1127647.
    """

    heads: ClassVar[tuple[str, ...]] = ("fc",)

    def __init__(
        self, size: int = 64, *, channels: int = 3, latent: int = 128, widths: Sequence[int] | None = None
    ) -> None:
        super().__init__(size, channels, latent, widths)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels, size, size] -> codes [B, latent]."""
        checks.images("Autoencoder", x, self.shape)
        return self.coded(x)[0]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """[B, latent] -> [B, channels, size, size]."""
        return self.decoded(z)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))

    def training_step(self, x: torch.Tensor) -> AutoencoderLoss:
        """The squared error of an image, summed over its values: 0-d float32, the mean over the batch."""
        mu, logvar = x.new_zeros(2, len(x), 1)  # no KL: the VAE's reconstruction term is one kernel
        losses = ops.vae_loss(self(x).flatten(1), x.flatten(1), mu, logvar, likelihood="gaussian", beta=0.0)
        return AutoencoderLoss(losses.reconstruction)

    @torch.no_grad()
    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """What decoder and encoder make of x, in its shape."""
        return self(x)

    @torch.no_grad()
    def interpolate(self, a: torch.Tensor, b: torch.Tensor, steps: int) -> torch.Tensor:
        """Images [channels, size, size] a and b -> [steps, ...]: decoded from the line between their codes.

        The first and the last are the reconstructions of a and b. Runs in evaluation, and leaves each module's mode.
        """
        with latents.evaluating(self):
            return self.decode(latents.line(*self.encode(torch.stack([a, b])), steps))

    def extra_repr(self) -> str:
        return f"size={self.shape[-1]}, latent={self.latent}"
