"""What the variational autoencoders of images and sounds share."""

from typing import NamedTuple

import torch
from torch import nn

from genai_fast import ops
from genai_fast.models.common import latents


class VAEOutput(NamedTuple):
    recon: torch.Tensor  # what the decoder gives: logits (Bernoulli) or means (Gaussian)
    mu: torch.Tensor  # [B, latent]
    logvar: torch.Tensor  # [B, latent]


class VAE(nn.Module):
    """A variational autoencoder by what a subclass has: encode, decode, `latent` and `beta`.

    Of a conditional one all methods take the labels [B] after the samples.
    """

    likelihood: str = "gaussian"
    latent: int
    beta: float

    def forward(self, x: torch.Tensor, *labels: torch.Tensor, seed: int | torch.Tensor | None = None) -> VAEOutput:
        """One pass through encoder, a draw of z, and decoder; `seed` as for `ops.reparameterize`."""
        mu, logvar = self.encode(x, *labels)
        return VAEOutput(self.decode(ops.reparameterize(mu, logvar, seed=seed), *labels), mu, logvar)

    def training_step(self, x: torch.Tensor, *labels: torch.Tensor) -> ops.VAELoss:
        """The negative ELBO of a batch and its terms: 0-d float32, means over the batch, in nats."""
        recon, mu, logvar = self(x, *labels)
        recon, x = recon.flatten(1), x.flatten(1)
        return ops.vae_loss(recon, x, mu, logvar, likelihood=self.likelihood, beta=self.beta)

    @torch.no_grad()
    def sample(self, count: int, *, seed: int | None = None) -> torch.Tensor:
        """Means of p(x | z) for z ~ N(0, I), `count` of them; a seed gives the same z on every device."""
        return self._mean(self.decode(latents.normal(count, self.latent, seed).to(next(self.parameters()))))

    @torch.no_grad()
    def reconstruct(self, x: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        """Means of p(x | z = mu(x)), in the shape of x."""
        return self._mean(self.decode(self.encode(x, *labels)[0], *labels)).view(x.shape)

    @torch.no_grad()
    def interpolate(self, a: torch.Tensor, b: torch.Tensor, steps: int) -> torch.Tensor:
        """Samples [...] a and b -> [steps, ...]: decoded from the line mu(a) to mu(b).

        The first and the last are the reconstructions of a and b. Runs in evaluation, and leaves each module's mode.
        """
        with latents.evaluating(self):
            z = latents.line(*self.encode(torch.stack([a, b]))[0], steps)
            return self._mean(self.decode(z)).view(-1, *a.shape)

    def _mean(self, recon: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(recon) if self.likelihood == "bernoulli" else recon


class ImageVAE(VAE):
    """One of images, which it can repair."""

    def inpaint(
        self, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None = None, *, steps: int = 200,
        lr: float = 0.05, seed: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Repair x [B, C, H, W] where mask [B, 1, H, W] is True; see `latents.inpaint`. A conditional one needs labels.

        Runs in evaluation, and leaves each module's mode, the weights and their gradients as they are.
        """
        given, how = () if labels is None else (labels,), {"likelihood": self.likelihood, "lr": lr, "seed": seed}
        coders = (lambda images: self.encode(images, *given)), (lambda z: self.decode(z, *given))
        with latents.evaluating(self):
            return latents.inpaint(*coders, x, mask, steps=steps, **how)
