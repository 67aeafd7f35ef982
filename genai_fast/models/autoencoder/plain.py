"""The convolutional autoencoder of images in [-1, 1]: the loss is summed squared error."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from genai_fast.models.common.plain_conv import PlainConvCoder


class CodeDensity:
    """Codes through a Gaussian that is fitted to them: code = code_mean + code_factor z, code_factor lower triangular.

    So z ~ N(0, I) are draws from that Gaussian, and decode to samples. Before it is fitted, z is the code.
    """

    def begin_density(self, latent: int) -> None:
        self.register_buffer("code_mean", torch.zeros(latent))
        self.register_buffer("code_factor", torch.eye(latent))

    def whitened(self, code: torch.Tensor) -> torch.Tensor:
        """Codes [B, latent] -> z."""
        return torch.linalg.solve_triangular(self.code_factor, (code - self.code_mean).float().T, upper=False).T

    def coloured(self, z: torch.Tensor) -> torch.Tensor:
        """z [B, latent] -> codes."""
        return F.linear(z, self.code_factor, self.code_mean)


class PlainAutoencoder(CodeDensity, PlainConvCoder):
    heads = ("fc",)

    def __init__(
        self, size: int = 64, channels: int = 3, latent: int = 128,
        widths: tuple[int, ...] = (32, 64, 128, 256, 512), noise: float = 0.0, masking: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(size, channels, latent, widths)
        self.begin_density(latent)
        self.noise, self.masking = noise, masking

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.whitened(self.coded(x)[0])

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoded(self.coloured(z))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoded(self.coded(x)[0])

    def corrupt(self, x: torch.Tensor) -> torch.Tensor:
        """Gaussian noise is added to the images, then random pixels become black."""
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, device=x.device)
        if self.masking:
            x = torch.where(torch.rand(x.size(0), 1, *x.shape[2:], device=x.device) < self.masking, -1.0, x)
        return x

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over the batch."""
        return F.mse_loss(self(self.corrupt(x)), x, reduction="sum") / x.size(0)
