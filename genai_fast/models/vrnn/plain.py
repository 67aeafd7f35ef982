"""The variational recurrent network with PyTorch's own modules."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.models.common.plain_vae import PlainVAE


class PlainVRNN(PlainVAE, nn.Module):
    """The variational recurrent network, step by step; the loss is the mean negative ELBO of a sequence."""

    def __init__(
        self, vocabulary: int, embedding: int = 64, hidden: int = 256, latent: int = 32, beta: float = 1.0
    ) -> None:
        super().__init__()
        self.hidden, self.beta = hidden, beta
        self.embed = nn.Embedding(vocabulary, embedding)
        both = embedding + hidden
        self.prior = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.encoder = nn.Sequential(nn.Linear(both, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.phi_z = nn.Sequential(nn.Linear(latent, embedding), nn.ReLU())
        self.decoder_net = nn.Sequential(nn.Linear(both, hidden), nn.ReLU(), nn.Linear(hidden, vocabulary))
        self.cell = nn.GRUCell(2 * embedding, hidden)

    def step(
        self, ids: torch.Tensor, phi_z: torch.Tensor, h: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step of writing: z is drawn from the prior.

        ids [B], the last tokens, -1 where there is none yet; phi_z [B, embedding] of their z; the state before them
        h [B, hidden]; noise [B, latent] -> logits [B, V] of the next token, its phi_z, the state before it.
        """
        after = self.cell(torch.cat([self.embed(ids.clamp(min=0)), phi_z], dim=1), h)
        h = torch.where(ids[:, None] < 0, h, after)
        mu, logvar = self.prior(h).chunk(2, dim=1)
        phi_z = self.phi_z(mu + torch.exp(0.5 * logvar) * noise)
        return self.decoder_net(torch.cat([phi_z, h], dim=1)), phi_z, h

    @torch.no_grad()
    def generate(
        self, ids: list[int], pick: Callable[[torch.Tensor], int], end: int, generator: torch.Generator | None = None
    ) -> Iterator[int]:
        """The tokens behind ids, whose z are q's means; the generator draws the others. pick: logits [V] -> token."""
        h, width, latent = torch.zeros(1, self.hidden), self.embed.embedding_dim, self.phi_z[0].in_features
        for k, token in enumerate(ids):
            phi_x = self.embed(torch.tensor([token]))
            mu, _ = self.encoder(torch.cat([phi_x, h], dim=1)).chunk(2, dim=1)
            phi_z = self.phi_z(mu)
            if k < len(ids) - 1:
                h = self.cell(torch.cat([phi_x, phi_z], dim=1), h)
        token, phi_z = (ids[-1], phi_z) if ids else (-1, torch.zeros(1, width))
        while True:
            noise = torch.randn(1, latent, generator=generator)
            logits, phi_z, h = self.step(torch.tensor([token]), phi_z, h, noise)
            token = pick(logits[0])
            yield token

    def loss(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Of x; y, which language models predict, is ignored."""
        h = torch.zeros(x.size(0), self.hidden, device=x.device, dtype=self.embed.weight.dtype)
        nats = kl = 0.0
        for t in range(x.size(1)):
            phi_x = self.embed(x[:, t])
            mu, logvar = self.encoder(torch.cat([phi_x, h], dim=1)).chunk(2, dim=1)
            prior_mu, prior_logvar = self.prior(h).chunk(2, dim=1)
            z = self.reparameterize(mu, logvar)
            phi_z = self.phi_z(z)
            logits = self.decoder_net(torch.cat([phi_z, h], dim=1))
            nats = nats + F.cross_entropy(logits, x[:, t], reduction="sum")
            ratio = (logvar.exp() + (mu - prior_mu).pow(2)) / prior_logvar.exp()
            kl = kl + 0.5 * torch.sum(prior_logvar - logvar + ratio - 1)
            h = self.cell(torch.cat([phi_x, phi_z], dim=1), h)
        return (nats + self.beta * kl) / x.size(0)
