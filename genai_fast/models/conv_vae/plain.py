"""Convolutional variational autoencoders of images in [-1, 1]: the loss is summed squared error plus KL."""

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.models.common.plain_conv import PlainConvCoder
from genai_fast.models.common.plain_vae import PlainVAE


class PlainConvVAE(PlainVAE, PlainConvCoder):
    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.coded(x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoded(z)

    def forward(self, x: torch.Tensor, *labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mu, logvar = self.encode(x, *labels)
        z = self.reparameterize(mu, logvar)
        return self.decode(z, *labels), mu, logvar

    def loss(self, x: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        """The negative ELBO, the mean over the batch."""
        recon_x, mu, logvar = self(x, *labels)
        return (F.mse_loss(recon_x, x, reduction="sum") + self.kl(mu, logvar)) / x.size(0)


class PlainConditionalVAE(PlainConvVAE):
    """Labels [B] come with the images: the encoder sees their embedding as one more channel, the decoder one-hot."""

    def __init__(
        self, classes: int = 10, size: int = 64, channels: int = 3, latent: int = 128,
        widths: tuple[int, ...] = (32, 64, 128, 256, 512),
    ) -> None:  # fmt: skip
        super().__init__(size, channels, latent, widths, planes=1, labels=classes)
        self.classes = classes
        self.embed = nn.Embedding(classes, size * size)

    def encode(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plane = self.embed(labels).view(-1, 1, x.size(2), x.size(3))
        return self.coded(torch.cat([x, plane], dim=1))

    def decode(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.decoded(torch.cat([z, F.one_hot(labels, self.classes).to(z.dtype)], dim=1))
