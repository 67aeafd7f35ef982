"""The variational autoencoder of sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import nn

from genai_fast import ops
from genai_fast.layers import GRU
from genai_fast.models.common import checks, latents, sequences
from genai_fast.models.common.protocol import Request
from genai_fast.models.common.sequences import SequenceLosses
from genai_fast.ops import rows, updates


class TextVAE(nn.Module):
    """Token sequences, one Gaussian latent each: a GRU reads the sequence, another writes it from z.

    q(z | x) comes from the encoder's state at the sequence's own last token. The decoder starts at tanh(fc_hidden(z))
    and is given z beside each token's embedding. A decoder that predicts well from the tokens alone leaves z unused
    (kl near 0, "collapse"); against that stand `annealing`, `word_dropout` and `free_bits`, in training only: an
    evaluated loss is reconstruction + beta kl of the tokens as they are.

    Args:
        vocabulary: V; token ids are in [0, V).
        end: the id that ends each sequence, and that the decoder is given first.
        embedding: channels of a token, for encoder and decoder.
        hidden: units of each GRU.
        latent: dimensions of z.
        beta: weight of the KL term, >= 0.
        annealing: training steps over which that weight rises linearly from 0 to beta; 0: none. Steps are counted in
            the buffer `steps`, which a checkpoint keeps and a CUDA graph advances.
        word_dropout: share of the tokens given to the decoder that training replaces by a blank one, which has an
            embedding of its own (row V), drawn by the device's default generator.
        free_bits: nats up to which the batch's mean kl costs nothing in training.

    Raises: ValueError on settings that do not fit, and on ids and lengths that do not (values are read on the CPU
        alone).
    Source: Bowman et al. 2015, arXiv:1511.06349; free bits: Kingma et al. 2016, arXiv:1606.04934.
    """

    continues: ClassVar[bool] = False  # a sequence like the prompt is written

    def __init__(
        self, vocabulary: int, end: int, embedding: int = 128, hidden: int = 256, latent: int = 32, *,
        beta: float = 1.0, annealing: int = 0, word_dropout: float = 0.25, free_bits: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.positive("TextVAE", vocabulary=vocabulary, embedding=embedding, hidden=hidden, latent=latent)
        sequences.check_end("TextVAE", end, vocabulary)
        for name, value in (("beta", beta), ("annealing", annealing), ("free_bits", free_bits)):
            if not value >= 0:
                raise ValueError(f"TextVAE: {name}: expected at least 0, got {value}")
        if not 0.0 <= word_dropout <= 1.0:
            raise ValueError(f"TextVAE: word_dropout: expected a share in [0, 1], got {word_dropout}")
        self.vocabulary, self.end, self.latent, self.beta = vocabulary, end, latent, beta
        self.annealing, self.word_dropout, self.free_bits = annealing, word_dropout, free_bits
        self.embed = nn.Embedding(vocabulary + 1, embedding)
        self.encoder = GRU(embedding, hidden)
        self.fc_mu = nn.Linear(hidden, latent)
        self.fc_logvar = nn.Linear(hidden, latent)
        self.fc_hidden = nn.Linear(latent, hidden)
        self.decoder_gru = GRU(embedding + latent, hidden)
        self.head = nn.Linear(hidden, vocabulary)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def encode(self, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences [B, T] of which the first lengths [B] tokens count -> mu, logvar of q(z | x), [B, latent] each."""
        sequences.check_ids("TextVAE", "ids", ids, self.vocabulary, lengths)
        states, _ = self.encoder(self.embed(ids.t()))  # [T, B, H]: what comes behind a state does not change it
        last = (lengths - 1).clamp(0, ids.size(1) - 1).view(1, -1, 1).expand(1, -1, states.size(2))
        h = states.gather(0, last).squeeze(0)
        return self.fc_mu(h), self.fc_logvar(h)

    def logits(self, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """z [B, latent] and the decoder's tokens ids [B, T], the first of them `end` -> logits [T, B, V] of the tokens
        after each, steps first, as they are made."""
        states, _ = self.decoder_gru(self._given(z, ids.t()), self._first(z))
        return self.head(states)

    def forward(
        self, ids: torch.Tensor, lengths: torch.Tensor, *, seed: int | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits [T, B, V], kl [B], targets [T, B]) of one draw of z; `seed` of z as for `ops.reparameterize`."""
        mu, logvar = self.encode(ids, lengths)
        z, kl = ops.reparameterize_kl(mu, logvar, seed=seed)
        given = sequences.delayed(ids, self.end)
        if self.training and self.word_dropout:
            share = rows.drawn(lambda n: torch.rand(n, given.size(1), device=given.device), len(given))
            dropped = share < self.word_dropout
            dropped[:, 0] = False  # where a sequence begins is no word
            given = given.masked_fill(dropped, self.vocabulary)
        return self.logits(z, given), kl, sequences.targets(ids, lengths).t()

    def training_step(
        self, ids: torch.Tensor, lengths: torch.Tensor, *, seed: int | torch.Tensor | None = None
    ) -> SequenceLosses:
        """The negative ELBO of sequences [B, T], each with its `end`; int64, as lengths [B], which count it.

        What is behind a sequence's length is not looked at. In training each call is one step of annealing; under
        `Step(accumulate=n)` each update is.
        """
        logits, kl, targets = self(ids, lengths, seed=seed)
        nats = ops.cross_entropy(logits, targets, reduction="sum", inplace=True).float() / len(ids)
        kl = kl.float().mean()
        penalty = kl
        if self.training:
            if self.free_bits:
                penalty = kl.clamp(min=self.free_bits)
            if self.annealing:
                penalty = penalty * (self.steps.float() / self.annealing).clamp(max=1.0)
                self.steps.add_(updates.ends())
        return SequenceLosses(nats + self.beta * penalty, nats, kl, lengths.float().mean())

    def decoder(self, z: torch.Tensor) -> TextVAEDecoder:
        """A state that writes a sequence for each of z [B, latent], step by step; no gradient."""
        return TextVAEDecoder(self, z)

    def decode(self, z: torch.Tensor, choose: sequences.Choose | None = None, *, longest: int = 256) -> list[list[int]]:
        """z [B, latent] -> a list of token ids for each, without `end`.

        Args:
            choose: logits [B, V] -> tokens [B], such as a `generation.Sampler`; None: the likeliest.
            longest: most tokens.
        """
        first = torch.full((len(z),), self.end, device=z.device)
        return sequences.written(self.decoder(z), first, choose, longest, self.end)

    def sample(
        self, count: int, choose: sequences.Choose | None = None, *, longest: int = 256, seed: int | None = None
    ) -> list[list[int]]:
        """`decode` of z ~ N(0, I); a seed gives the same z on every device."""
        return self.decode(self._normal(count, seed), choose, longest=longest)

    @torch.no_grad()
    def reconstruct(
        self, ids: torch.Tensor, lengths: torch.Tensor, choose: sequences.Choose | None = None, *, longest: int = 256
    ) -> list[list[int]]:
        """`decode` of z = mu(x), for sequences [B, T] and their lengths [B]."""
        return self.decode(self.encode(ids, lengths)[0], choose, longest=longest)

    @torch.no_grad()
    def interpolate(
        self, a: torch.Tensor, b: torch.Tensor, steps: int, choose: sequences.Choose | None = None, *,
        longest: int = 256,
    ) -> list[list[int]]:  # fmt: skip
        """`decode` of `steps` z on the line from mu(a) to mu(b), both included, for token ids a [T] and b [U]."""
        ends = [self._mean(x)[0] for x in (a, b)]
        return self.decode(latents.line(*ends, steps), choose, longest=longest)

    def generate_ids(
        self,
        prompt: torch.Tensor | None = None,
        choose: sequences.Choose | None = None,
        *,
        longest: int = 256,
        seed: int | None = None,
    ) -> Iterator[int]:
        """The token ids of one sequence, one at a time as they are made, until `end`, which is left out.

        Args:
            prompt: token ids [T], with `end`: the sequence is written from their mu; None: from a z of N(0, I).
            choose: logits [1, V] -> token [1], such as a `generation.Sampler`; None: the likeliest.
            longest: most tokens.
            seed: of z.
        """
        z = self._normal(1, seed) if prompt is None else self._mean(prompt)
        first = torch.full((1,), self.end, device=z.device)
        return sequences.streamed(self.decoder(z), first, choose, longest, self.end)

    def write_ids(self, request: Request) -> Iterator[int]:
        """See `protocol.Writes`."""
        prompt, end, sampler, longest, seed, *_ = request
        given = torch.tensor([*prompt, end]) if prompt else None
        return self.generate_ids(given, sampler, longest=longest, seed=seed)

    def extra_repr(self) -> str:
        return (
            f"vocabulary={self.vocabulary}, end={self.end}, latent={self.latent}, beta={self.beta:g},"
            f" annealing={self.annealing}, word_dropout={self.word_dropout:g}, free_bits={self.free_bits:g}"
        )

    def _given(self, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """What the decoder reads, for tokens [T, B]: [T, B, embedding + latent]."""
        x = self.embed(ids)
        return torch.cat([x, z.to(x.dtype).expand(len(ids), -1, -1)], 2)

    def _first(self, z: torch.Tensor) -> torch.Tensor:
        """The decoder's first state [1, B, H]."""
        return torch.tanh(self.fc_hidden(z))[None]

    def _normal(self, count: int, seed: int | None) -> torch.Tensor:
        return latents.normal(count, self.latent, seed).to(next(self.parameters()))

    @torch.no_grad()
    def _mean(self, prompt: torch.Tensor) -> torch.Tensor:
        """mu [1, latent] of one sequence's token ids [T]."""
        ids = sequences.prompt_ids("TextVAE", prompt, self.vocabulary, next(self.parameters()).device)
        return self.encode(ids, torch.tensor([ids.size(1)], device=ids.device))[0]


class TextVAEDecoder:
    """What `TextVAE.decoder` gives: the decoder's state of each sequence."""

    @torch.no_grad()
    def __init__(self, model: TextVAE, z: torch.Tensor) -> None:
        self.model, self.z, self.state = model, z, model._first(z)

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """The next token ids [B] of all sequences, `end` the first time -> logits [B, V] of those after them."""
        y, self.state = self.model.decoder_gru(self.model._given(self.z, ids[None]), self.state)
        return self.model.head(y[0])
