"""The sentence VAE with PyTorch's own modules."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from genai_fast.models.common.plain_vae import PlainVAE


class PlainTextVAE(PlainVAE, nn.Module):
    """The sentence VAE with packed sequences; the loss is the mean negative ELBO of a sequence."""

    def __init__(
        self, vocabulary: int, end: int, embedding: int = 128, hidden: int = 256, latent: int = 32, beta: float = 1.0,
        annealing: int = 0, word_dropout: float = 0.25,
    ) -> None:  # fmt: skip
        super().__init__()
        self.unknown, self.end, self.beta = vocabulary, end, beta
        self.annealing, self.word_dropout = annealing, word_dropout
        self.embed = nn.Embedding(vocabulary + 1, embedding)
        self.encoder = nn.GRU(embedding, hidden, batch_first=True)
        self.fc_mu = nn.Linear(hidden, latent)
        self.fc_logvar = nn.Linear(hidden, latent)
        self.fc_hidden = nn.Linear(latent, hidden)
        self.decoder_gru = nn.GRU(embedding + latent, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def encode(self, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed = pack_padded_sequence(self.embed(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, h = self.encoder(packed)
        return self.fc_mu(h[-1]), self.fc_logvar(h[-1])

    def decode(self, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """z [B, latent], tokens [B, T], the first of them `end` -> logits [B, T, V] of the tokens after each."""
        x = self.embed(ids)
        x = torch.cat([x, z.unsqueeze(1).expand(-1, x.size(1), -1)], dim=-1)
        out, _ = self.decoder_gru(x, torch.tanh(self.fc_hidden(z)).unsqueeze(0))
        return self.head(out)

    def step(self, z: torch.Tensor, ids: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of writing from z [B, latent]: the last tokens ids [B], `end` before the first, and the state before
        them h [B, hidden], any then -> logits [B, V] of the next token, the state behind."""
        h = torch.where(ids[:, None] == self.end, torch.tanh(self.fc_hidden(z)), h)
        out, h = self.decoder_gru(torch.cat([self.embed(ids), z], dim=-1).unsqueeze(1), h.unsqueeze(0))
        return self.head(out[:, 0]), h[0]

    @torch.no_grad()
    def generate(
        self, ids: list[int], pick: Callable[[torch.Tensor], int], end: int, generator: torch.Generator | None = None
    ) -> Iterator[int]:
        """Tokens of a sequence like ids, or of a z drawn by the generator; pick: logits [V] -> token."""
        if ids:
            z, _ = self.encode(torch.tensor([[*ids, end]]), torch.tensor([len(ids) + 1]))
        else:
            z = torch.randn(1, self.fc_hidden.in_features, generator=generator)
        token, h = end, torch.zeros(1, self.fc_hidden.out_features)
        while True:
            logits, h = self.step(z, torch.tensor([token]), h)
            token = pick(logits[0])
            yield token

    def loss(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mu, logvar = self.encode(ids, lengths)
        z = self.reparameterize(mu, logvar)
        words = ids[:, :-1]
        if self.training and self.word_dropout > 0:
            drop = torch.rand(words.shape, device=ids.device) < self.word_dropout
            words = words.masked_fill(drop, self.unknown)
        start = torch.full((ids.size(0), 1), self.end, device=ids.device)
        logits = self.decode(z, torch.cat([start, words], dim=1))
        padding = torch.arange(ids.size(1), device=ids.device) >= lengths[:, None]
        labels = ids.masked_fill(padding, -100)
        nats = F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-100, reduction="sum")
        weight = self.beta
        if self.training:
            if self.annealing:
                weight = weight * min(1.0, self.steps.item() / self.annealing)
            self.steps += 1
        return (nats + weight * self.kl(mu, logvar)) / ids.size(0)
