"""The convolutional autoencoder: ConvVAE's networks without sampling in training."""

from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import torch

from genai_fast import ops
from genai_fast.models.autoencoder.plain import CodeDensity
from genai_fast.models.common import checks, latents
from genai_fast.models.common.conv import ConvCoder
from genai_fast.ops import rows

_SHRINKAGE = 1e-4  # of the codes' covariance towards a multiple of I, so that it has a factor whatever the codes are


class AutoencoderLoss(NamedTuple):
    loss: torch.Tensor  # 0-d float32


class Autoencoder(CodeDensity, ConvCoder):
    """Images [B, channels, size, size] in [-1, 1] -> codes [B, latent] -> images, by the networks of `ConvVAE`.

    A Gaussian with full covariance is fitted to the codes by `fit_density`, which `genai-fast train` does after each
    epoch. `encode` and `decode` deal in codes that it has whitened, so z ~ N(0, I) decodes to samples.

    With `noise` or `masking` it is a denoising autoencoder: the input of a training step is corrupted, the target is
    not.

    Args:
        latent: length of the code.
        size, channels, widths: as of `ConvVAE`.
        noise: standard deviation of Gaussian noise on the pixels, >= 0.
        masking: share of the pixels that become black, in [0, 1).

    Raises: ValueError on sizes that do not fit, and on images of another shape.
    Source: Hinton & Salakhutdinov 2006, doi:10.1126/science.1127647; denoising: Vincent et al. 2008,
        doi:10.1145/1390156.1390294; sampling: Ghosh et al. 2020, arXiv:1903.12436.
    """

    heads: ClassVar[tuple[str, ...]] = ("fc",)
    added_tensors: ClassVar[tuple[str, ...]] = ("code_mean", "code_factor")

    def __init__(
        self, size: int = 64, *, channels: int = 3, latent: int = 128, widths: Sequence[int] | None = None,
        noise: float = 0.0, masking: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(size, channels, latent, widths)
        if noise < 0 or not 0 <= masking < 1:
            raise ValueError(f"Autoencoder: expected noise >= 0 and 0 <= masking < 1, got {noise} and {masking}")
        self.begin_density(latent)
        self.noise, self.masking = noise, masking

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels, size, size] -> whitened codes z [B, latent], float32."""
        return self.whitened(self._code(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """z [B, latent] -> [B, channels, size, size]."""
        return self.decoded(self.coloured(z))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoded(self._code(x))

    def training_step(self, x: torch.Tensor) -> AutoencoderLoss:
        """The squared error of an image, summed over its values: 0-d float32, the mean over the batch."""
        mu, logvar = x.new_zeros(2, len(x), 1)  # no KL: the VAE's reconstruction term is one kernel
        recon = self(self.corrupt(x)).flatten(1)
        losses = ops.vae_loss(recon, x.flatten(1), mu, logvar, likelihood="gaussian", beta=0.0)
        return AutoencoderLoss(losses.reconstruction)

    def corrupt(self, x: torch.Tensor) -> torch.Tensor:
        """Images as a training step's input: with noise, then with random pixels black."""
        if self.noise:
            x = x + self.noise * rows.drawn(lambda n: torch.randn(n, *x.shape[1:], device=x.device), len(x))
        if self.masking:
            share = rows.drawn(lambda n: torch.rand(n, 1, *x.shape[2:], device=x.device), len(x))
            x = torch.where(share < self.masking, -1.0, x)
        return x

    @torch.no_grad()
    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """What decoder and encoder make of x, in its shape."""
        return self(x)

    @torch.no_grad()
    def sample(self, count: int, *, seed: int | None = None) -> torch.Tensor:
        """Images [count, channels, size, size] of draws from the density; a seed gives the same on every device."""
        return self.decode(latents.normal(count, self.latent, seed).to(self.code_mean))

    @torch.no_grad()
    def fit_density(self, batches: Iterable[torch.Tensor]) -> None:
        """Fit mean and covariance of the density to the codes of images, batches [B, channels, size, size].

        Runs in evaluation, and leaves each module's mode.

        Raises: ValueError on fewer than two images, and on codes that are not finite; nothing is changed then.
        """
        with latents.evaluating(self):
            codes = torch.cat([self._code(x).double() for x in batches] or [self.code_mean.double()[None]])
        if len(codes) < 2 or not codes.isfinite().all():
            got = "infinite or NaN ones" if len(codes) > 1 else "fewer"
            raise ValueError(f"Autoencoder: fit_density: expected finite codes of at least 2 images, got {got}")
        covariance = torch.atleast_2d(torch.cov(codes.T))
        variance = covariance.diagonal().mean().clamp(min=1e-12)
        covariance.lerp_(variance * torch.eye(self.latent).to(covariance), _SHRINKAGE)
        self.code_mean.copy_(codes.mean(0))
        self.code_factor.copy_(torch.linalg.cholesky(covariance))

    def _code(self, x: torch.Tensor) -> torch.Tensor:
        checks.images("Autoencoder", x, self.shape)
        return self.coded(x)[0]

    def extra_repr(self) -> str:
        return f"size={self.shape[-1]}, latent={self.latent}, noise={self.noise:g}, masking={self.masking:g}"
