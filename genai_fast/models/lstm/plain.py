"""The LSTM language model with PyTorch's own modules."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn


class PlainLSTMLanguageModel(nn.Module):
    """Embedding, LSTM, linear; the hidden state carries over from batch to batch. Arguments as LSTMLanguageModel's."""

    def __init__(
        self, vocabulary: int, embedding: int = 128, hidden: int = 256, layers: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, dropout=dropout if layers > 1 else 0.0, batch_first=True)
        self.decoder = nn.Linear(hidden, vocabulary)
        self.hidden: tuple[torch.Tensor, torch.Tensor] | None = None

    def init_hidden(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight = next(self.parameters())
        shape = (self.lstm.num_layers, batch, self.lstm.hidden_size)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    def forward(
        self, x: torch.Tensor, hidden: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        emb = self.drop(self.encoder(x))
        output, hidden = self.lstm(emb, hidden)
        return self.decoder(self.drop(output)), hidden

    def step(
        self, ids: torch.Tensor, h: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step of writing: the last tokens ids [B] and the state before them, h and c [layers, B, hidden] -> logits
        [B, V] of the next token, the state behind."""
        output, (h, c) = self.lstm(self.drop(self.encoder(ids[:, None])), (h, c))
        return self.decoder(self.drop(output))[:, 0], h, c

    @torch.no_grad()
    def generate(
        self, ids: list[int], pick: Callable[[torch.Tensor], int], end: int, generator: torch.Generator | None = None
    ) -> Iterator[int]:
        """The tokens behind ids, without an end; pick: logits [V] -> token."""
        ids, hidden = ids or [end], None
        while True:
            logits, hidden = self(torch.tensor([ids]), hidden)
            ids = [pick(logits[0, -1])]
            yield ids[0]

    def loss(self, x: torch.Tensor, y: torch.Tensor, carry: torch.Tensor) -> torch.Tensor:
        if self.hidden is None:
            self.hidden = self.init_hidden(x.size(0))
        hidden = tuple(s.detach() * carry[None, :, None] for s in self.hidden)
        logits, self.hidden = self(x, hidden)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1))
