"""What the plain variational autoencoders share: a draw of z, and the KL term."""

import torch


class PlainVAE:
    def reparameterize(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def kl(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        """KL(N(mu, exp(logvar)) || N(0, I)), summed over everything."""
        return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
