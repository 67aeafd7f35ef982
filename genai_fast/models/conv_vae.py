"""Convolutional variational autoencoders, one of them conditional on a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from genai_fast import ops
from genai_fast.models import _check, _labels, latents
from genai_fast.models._conv import ConvCoder
from genai_fast.models.vae import VAEOutput


class ConvVAE(ConvCoder):
    """Images [B, channels, size, size] in [-1, 1], one Gaussian latent [B, latent], a decoder that ends in tanh.

    Encoder: Conv k3 s2 p1 + batch norm + LeakyReLU for each of `widths`; Linear heads for mu and logvar. Decoder:
    Linear, then ConvTranspose k3 s2 p1 (output padding 1) + batch norm + LeakyReLU back, Conv k3, tanh. The likelihood
    is Gaussian of variance 1/2: squared error.

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

    heads: ClassVar[tuple[str, ...]] = ("fc_mu", "fc_logvar")

    def __init__(
        self, size: int = 64, *, channels: int = 3, latent: int = 128, widths: Sequence[int] | None = None,
        beta: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(size, channels, latent, widths)
        self.beta = beta

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, channels, size, size] -> mu, logvar of q(z | x), each [B, latent]."""
        _check.images("ConvVAE", x, self.shape)
        return self._encode(x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """[B, latent] -> means of p(x | z), [B, channels, size, size]."""
        return self._decode(z)

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
        return self.decode(latents.normal(count, self.latent, seed).to(self.fc_mu.weight))

    @torch.no_grad()
    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Means of p(x | z = mu(x)), in the shape of x."""
        return self.decode(self.encode(x)[0])

    @torch.no_grad()
    def interpolate(self, a: torch.Tensor, b: torch.Tensor, steps: int) -> torch.Tensor:
        """Images [channels, size, size] a and b -> [steps, channels, size, size]: decoded from the line mu(a) to mu(b).

        The first and the last are the reconstructions of a and b. Runs in evaluation, and leaves each module's mode.
        """
        with latents.evaluating(self):
            return self.decode(latents.line(*self.encode(torch.stack([a, b]))[0], steps))

    def inpaint(
        self, x: torch.Tensor, mask: torch.Tensor, *, steps: int = 200, lr: float = 0.05, seed: int | None = None
    ) -> torch.Tensor:
        """Repair x [B, channels, size, size] where mask [B, 1, size, size] is True; see `latents.inpaint`.

        Runs in evaluation, and leaves each module's mode, the weights and their gradients as they are.
        """
        with latents.evaluating(self):
            return latents.inpaint(self.encode, self.decode, x, mask, steps=steps, lr=lr, seed=seed)

    def extra_repr(self) -> str:
        return f"size={self.shape[-1]}, latent={self.latent}, beta={self.beta:g}"


class ConditionalVAE(ConvCoder):
    """`ConvVAE` that is told the class: q(z | x, label) and p(x | z, label).

    The encoder sees the label's embedding as one more channel, the decoder its one-hot vector beside z. The keys are
    those of `ConvVAE`, and `embed.weight`.

    Args:
        classes: labels are int64 in [0, classes).
        size, channels, latent, widths, beta: as of `ConvVAE`.

    Raises: ValueError on sizes that do not fit, images of another shape, and labels of another dtype, shape or (on the
        CPU alone: on CUDA the check would wait for the device) range.
    Source: Sohn, Lee & Yan 2015, "Learning structured output representation using deep conditional generative models".
    """

    heads: ClassVar[tuple[str, ...]] = ("fc_mu", "fc_logvar")

    def __init__(
        self, classes: int = 10, size: int = 64, *, channels: int = 3, latent: int = 128,
        widths: Sequence[int] | None = None, beta: float = 1.0,
    ) -> None:  # fmt: skip
        _check.positive("ConditionalVAE", classes=classes)
        super().__init__(size, channels, latent, widths, planes=1, labels=classes)
        self.classes, self.beta = classes, beta
        self.embed = nn.Embedding(classes, size * size)

    def encode(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, channels, size, size], [B] -> mu, logvar of q(z | x, label), each [B, latent]."""
        _check.images("ConditionalVAE", x, self.shape)
        _labels.check("ConditionalVAE", labels, len(x), self.classes)
        return self._encode(_labels.with_plane(x, self.embed(labels)))

    def decode(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[B, latent], [B] -> means of p(x | z, label), [B, channels, size, size]."""
        _labels.check("ConditionalVAE", labels, len(z), self.classes)
        # Not F.one_hot, which waits for the device to look at the labels' range.
        one_hot = labels[:, None] == torch.arange(self.classes, device=labels.device)
        return self._decode(torch.cat([z, one_hot.to(z.dtype)], 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor, *, seed: int | torch.Tensor | None = None) -> VAEOutput:
        """One pass through encoder, a draw of z, and decoder; `seed` as for `ops.reparameterize`."""
        mu, logvar = self.encode(x, labels)
        return VAEOutput(self.decode(ops.reparameterize(mu, logvar, seed=seed), labels), mu, logvar)

    def training_step(self, x: torch.Tensor, labels: torch.Tensor) -> ops.VAELoss:
        """The negative ELBO of a batch and its terms: 0-d float32, means over the batch, in nats."""
        recon, mu, logvar = self(x, labels)
        return ops.vae_loss(recon.flatten(1), x.flatten(1), mu, logvar, likelihood="gaussian", beta=self.beta)

    @torch.no_grad()
    def sample(self, count: int, labels: torch.Tensor | None = None, *, seed: int | None = None) -> torch.Tensor:
        """Means of p(x | z, label) for z ~ N(0, I), [count, channels, size, size].

        Labels are int64 [count]; None stands for 0, 1, ..., classes - 1, 0, ... A seed gives the same z everywhere.
        """
        weight = self.fc_mu.weight
        labels = torch.arange(count, device="cpu") % self.classes if labels is None else labels
        return self.decode(latents.normal(count, self.latent, seed).to(weight), labels.to(weight.device))

    @torch.no_grad()
    def reconstruct(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Means of p(x | z = mu(x, label), label), in the shape of x."""
        return self.decode(self.encode(x, labels)[0], labels)

    @torch.no_grad()
    def interpolate(self, a: torch.Tensor, b: torch.Tensor, steps: int, labels: torch.Tensor) -> torch.Tensor:
        """As `ConvVAE.interpolate`; labels [2] are those of a and b, and each step is decoded with the nearer one's."""
        with latents.evaluating(self):
            z = latents.line(*self.encode(torch.stack([a, b]), labels)[0], steps)
            return self.decode(z, torch.cat([labels[:1].expand((steps + 1) // 2), labels[1:].expand(steps // 2)]))

    def inpaint(
        self, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, *, steps: int = 200, lr: float = 0.05,
        seed: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """As `ConvVAE.inpaint`, given the labels [B]."""

        def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.encode(images, labels)

        def decode(z: torch.Tensor) -> torch.Tensor:
            return self.decode(z, labels)

        with latents.evaluating(self):
            return latents.inpaint(encode, decode, x, mask, steps=steps, lr=lr, seed=seed)

    def extra_repr(self) -> str:
        return f"classes={self.classes}, size={self.shape[-1]}, latent={self.latent}, beta={self.beta:g}"
