"""DCGAN conditional on a class: labels go into the generator and the discriminator. The latter ends in logits."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from genai_fast.models import _check, _labels
from genai_fast.models.gan import discriminator, generator


class ConditionalGenerator(nn.Module):
    """z [B, latent] or [B, latent, 1, 1], labels [B] -> image [B, channels, size, size] in [-1, 1].

    The label's embedding is concatenated to z; then all is `DCGANGenerator` (its keys too, beside `embed.weight`).

    Args:
        classes: labels are int64 in [0, classes).
        size: 28, 32, 64 or 128.
        latent: length of z.
        width: channels of the last feature map; each one before has twice as many.
        channels: of the image.
        embedding: length of the label's embedding.

    Raises: ValueError on sizes below 1 and on labels of another dtype, shape or (on the CPU alone: on CUDA the check
        would wait for the device) range.
    Source: Mirza & Osindero 2014, arXiv:1411.1784; Radford, Metz & Chintala 2015, arXiv:1511.06434.
    """

    signed: ClassVar[bool] = True

    def __init__(
        self, classes: int = 10, size: int = 64, *, latent: int = 100, width: int = 64, channels: int = 3,
        embedding: int = 100,
    ) -> None:  # fmt: skip
        super().__init__()
        _check.positive("ConditionalGenerator", classes=classes, latent=latent, embedding=embedding)
        self.classes, self.latent = classes, latent
        self.embed = nn.Embedding(classes, embedding)
        self.main = generator("ConditionalGenerator", size, latent + embedding, width, channels)

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        z = z.flatten(1)
        _labels.check("ConditionalGenerator", labels, len(z), self.classes)
        embedded = self.embed(labels)
        return self.main(torch.cat([z.to(embedded.dtype), embedded], 1)[..., None, None])


class ConditionalDiscriminator(nn.Module):
    """Image [B, channels, size, size] in [-1, 1], labels [B] -> logits [B] of being real and of that class.

    The label's embedding is one more channel of the image; then all is `DCGANDiscriminator` (its keys too, beside
    `embed.weight`), whose `norm` and `spectral` make it the critic of a conditional WGAN-GP.

    Args:
        classes: labels are int64 in [0, classes).
        size: 28, 32, 64 or 128.
        width, channels, dropout, norm, spectral: as of `DCGANDiscriminator`.

    Raises: ValueError on sizes below 1, images of another shape, and labels of another dtype, shape or (on the CPU
        alone) range.
    Source: Mirza & Osindero 2014, arXiv:1411.1784; Radford, Metz & Chintala 2015, arXiv:1511.06434.
    """

    signed: ClassVar[bool] = True

    def __init__(
        self, classes: int = 10, size: int = 64, *, width: int = 64, channels: int = 3, dropout: float = 0.0,
        norm: str = "batch", spectral: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        owner = "ConditionalDiscriminator"
        _check.positive(owner, classes=classes, width=width, channels=channels)
        self.classes, self.shape = classes, (channels, size, size)
        settings = {"dropout": dropout, "norm": norm, "spectral": spectral}
        self.embed = nn.Embedding(classes, size * size)
        self.main = discriminator(owner, size, width, channels + 1, **settings)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        _check.images("ConditionalDiscriminator", x, self.shape)
        _labels.check("ConditionalDiscriminator", labels, len(x), self.classes)
        return self.main(_labels.with_plane(x, self.embed(labels))).flatten()
