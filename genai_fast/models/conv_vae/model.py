"""Convolutional variational autoencoders, one of them conditional on a class."""

from collections.abc import Sequence

import torch
from torch import nn

from genai_fast.models.common import checks, latents
from genai_fast.models.common import labels as classes_of
from genai_fast.models.common.conv import ConvCoder
from genai_fast.models.common.vae import ImageVAE


class ConvVAE(ImageVAE, ConvCoder):
    """Images [B, channels, size, size] in [-1, 1], one Gaussian latent [B, latent], a decoder that ends in tanh.

    The networks are those of `plain_conv.PlainConvCoder`; the likelihood is Gaussian of variance 1/2: squared error.

    Args:
        size: side of the image: a multiple of 2 ** len(widths), such as 28, 64, 128 or 256.
        channels: of the image: 1 or 3, say.
        latent: dimensions of z.
        widths: channels of the encoder's feature maps; None: (32, 64, 128, 256, 512), for small images the first of
            these (two of them for 28 pixels, four for 32).
        beta: weight of the KL term, >= 0.

    Raises: ValueError on sizes that do not fit, and on images of another shape.
    Source: Kingma & Welling 2013, arXiv:1312.6114; beta: Higgins et al. 2017.
    """

    def __init__(
        self, size: int = 64, *, channels: int = 3, latent: int = 128, widths: Sequence[int] | None = None,
        beta: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(size, channels, latent, widths)
        self.beta = beta

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, channels, size, size] -> mu, logvar of q(z | x), each [B, latent]."""
        checks.images("ConvVAE", x, self.shape)
        return self.coded(x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """[B, latent] -> means of p(x | z), [B, channels, size, size]."""
        return self.decoded(z)

    def extra_repr(self) -> str:
        return f"size={self.shape[-1]}, latent={self.latent}, beta={self.beta:g}"


class ConditionalVAE(ConvVAE):
    """`ConvVAE` that is told the class: q(z | x, label) and p(x | z, label).

    The encoder sees the label's embedding as one more channel, the decoder its one-hot vector beside z. The keys are
    those of `ConvVAE`, and `embed.weight`. Its methods take the labels [B] after the images.

    Args:
        classes: labels are int64 in [0, classes).
        size, channels, latent, widths, beta: as of `ConvVAE`.

    Raises: ValueError on sizes that do not fit, images of another shape, and labels of another dtype, shape or (on the
        CPU alone: on CUDA the check would wait for the device) range.
    Source: Sohn, Lee & Yan 2015, "Learning structured output representation using deep conditional generative models".
    """

    def __init__(
        self, classes: int = 10, size: int = 64, *, channels: int = 3, latent: int = 128,
        widths: Sequence[int] | None = None, beta: float = 1.0,
    ) -> None:  # fmt: skip
        checks.positive("ConditionalVAE", classes=classes)
        ConvCoder.__init__(self, size, channels, latent, widths, planes=1, labels=classes)
        self.classes, self.beta = classes, beta
        self.embed = nn.Embedding(classes, size * size)

    def encode(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, channels, size, size], [B] -> mu, logvar of q(z | x, label), each [B, latent]."""
        checks.images("ConditionalVAE", x, self.shape)
        classes_of.check("ConditionalVAE", labels, len(x), self.classes)
        return self.coded(classes_of.with_plane(x, self.embed(labels)))

    def decode(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[B, latent], [B] -> means of p(x | z, label), [B, channels, size, size]."""
        classes_of.check("ConditionalVAE", labels, len(z), self.classes)
        # Not F.one_hot, which waits for the device to look at the labels' range.
        one_hot = labels[:, None] == torch.arange(self.classes, device=labels.device)
        return self.decoded(torch.cat([z, one_hot.to(z.dtype)], 1))

    @torch.no_grad()
    def sample(self, count: int, labels: torch.Tensor | None = None, *, seed: int | None = None) -> torch.Tensor:
        """Means of p(x | z, label) for z ~ N(0, I), [count, channels, size, size].

        Labels are int64 [count]; None stands for 0, 1, ..., classes - 1, 0, ... A seed gives the same z everywhere.
        """
        weight = next(self.parameters())
        labels = torch.arange(count, device="cpu") % self.classes if labels is None else labels
        return self.decode(latents.normal(count, self.latent, seed).to(weight), labels.to(weight.device))

    @torch.no_grad()
    def interpolate(self, a: torch.Tensor, b: torch.Tensor, steps: int, labels: torch.Tensor) -> torch.Tensor:
        """As `ConvVAE.interpolate`; labels [2] are those of a and b, and each step is decoded with the nearer one's."""
        with latents.evaluating(self):
            z = latents.line(*self.encode(torch.stack([a, b]), labels)[0], steps)
            return self.decode(z, torch.cat([labels[:1].expand((steps + 1) // 2), labels[1:].expand(steps // 2)]))

    def extra_repr(self) -> str:
        return f"classes={self.classes}, {super().extra_repr()}"
