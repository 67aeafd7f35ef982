"""Models of sequences as their authors write them in plain PyTorch: the peers of speed figures; weights load both ways.

Each has `loss(*batch)`, a mean: a token for the Transformer, a sequence for the VAEs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence


class _Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int, dropout: float, cross: bool) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        if cross:
            self.query = nn.Linear(dim, dim)
            self.key_value = nn.Linear(dim, 2 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)

    def forward(
        self,
        x: torch.Tensor,
        memory: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        b, t, c = x.shape
        if memory is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q = self.query(x)
            k, v = self.key_value(memory).chunk(2, dim=-1)
        q, k, v = (y.view(b, -1, self.n_heads, c // self.n_heads).transpose(1, 2) for y in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        return self.project(y.transpose(1, 2).contiguous().view(b, t, c))


class _Layer(nn.Module):
    def __init__(self, dim: int, n_heads: int, dropout: float, cross: bool) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim)
        self.attention = _Attention(dim, n_heads, dropout, cross=False)
        if cross:
            self.norm_cross = nn.LayerNorm(dim)
            self.cross = _Attention(dim, n_heads, dropout, cross=True)
        self.norm_2 = nn.LayerNorm(dim)
        self.feed = nn.ModuleDict({"up": nn.Linear(dim, 4 * dim), "down": nn.Linear(4 * dim, dim)})
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x), mask=mask, is_causal=memory is not None))
        if memory is not None:
            x = x + self.dropout(self.cross(self.norm_cross(x), memory, memory_mask))
        h = F.gelu(self.feed["up"](self.norm_2(x)), approximate="tanh")
        return x + self.dropout(self.feed["down"](h))


class EagerSeq2Seq(nn.Module):
    """A pre-norm encoder-decoder Transformer with a boolean mask over the sources' padding."""

    def __init__(
        self, vocabulary: int, end: int, block: int = 256, layers: int = 4, heads: int = 4, width: int = 256,
        dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.end, self.block = end, block
        self.embed = nn.Embedding(vocabulary, width)
        self.source_positions = nn.Embedding(block, width)
        self.target_positions = nn.Embedding(block, width)
        self.dropout = nn.Dropout(dropout)
        self.encoder_blocks = nn.ModuleList([_Layer(width, heads, dropout, cross=False) for _ in range(layers)])
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder_blocks = nn.ModuleList([_Layer(width, heads, dropout, cross=True) for _ in range(layers)])
        self.decoder_norm = nn.LayerNorm(width)

    def forward(self, source: torch.Tensor, source_lengths: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        places, target_places = (torch.arange(x.size(1), device=x.device) for x in (source, ids))
        mask = (places < source_lengths[:, None])[:, None, None, :]
        memory = self.dropout(self.embed(source) + self.source_positions(places))
        for layer in self.encoder_blocks:
            memory = layer(memory, mask)
        memory = self.encoder_norm(memory)
        x = self.dropout(self.embed(ids) + self.target_positions(target_places))
        for layer in self.decoder_blocks:
            x = layer(x, None, memory, mask)
        return F.linear(self.decoder_norm(x), self.embed.weight)

    @torch.no_grad()
    def generate(
        self, ids: list[int], pick: Callable[[torch.Tensor], int], end: int, generator: torch.Generator | None = None
    ) -> Iterator[int]:
        """The target's tokens for the source ids, a block at most; pick: logits [V] -> token."""
        if len(ids) >= self.block:
            raise ValueError(
                f"expected at most {self.block - 1} tokens to begin with, got {len(ids)}; shorten the text"
            )
        source, written = torch.tensor([[*ids, end]]), [end]
        lengths = torch.tensor([source.size(1)])
        for _ in range(self.block):
            written.append(pick(self(source, lengths, torch.tensor([written]))[0, -1]))
            yield written[-1]

    def loss(
        self, source: torch.Tensor, source_lengths: torch.Tensor, target: torch.Tensor, target_lengths: torch.Tensor
    ) -> torch.Tensor:
        start = torch.full((target.size(0), 1), self.end, device=target.device)
        logits = self(source, source_lengths, torch.cat([start, target[:, :-1]], dim=1))
        padding = torch.arange(target.size(1), device=target.device) >= target_lengths[:, None]
        labels = target.masked_fill(padding, -100)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-100)


class EagerTextVAE(nn.Module):
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

    def reparameterize(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)

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
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        weight = self.beta
        if self.training:
            if self.annealing:
                weight = weight * min(1.0, self.steps.item() / self.annealing)
            self.steps += 1
        return (nats + weight * kl) / ids.size(0)


class EagerVRNN(nn.Module):
    """The variational recurrent network, step by step; the loss is the mean negative ELBO of a sequence."""

    def __init__(
        self, vocabulary: int, embedding: int = 64, hidden: int = 256, latent: int = 32, beta: float = 1.0
    ) -> None:
        super().__init__()
        self.hidden, self.beta = hidden, beta
        self.embed = nn.Embedding(vocabulary, embedding)
        self.prior = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.encoder = nn.Sequential(nn.Linear(embedding + hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.phi_z = nn.Sequential(nn.Linear(latent, embedding), nn.ReLU())
        self.decoder_net = nn.Sequential(
            nn.Linear(embedding + hidden, hidden), nn.ReLU(), nn.Linear(hidden, vocabulary)
        )
        self.cell = nn.GRUCell(2 * embedding, hidden)

    def reparameterize(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)

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

    def loss(self, x: torch.Tensor) -> torch.Tensor:
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
