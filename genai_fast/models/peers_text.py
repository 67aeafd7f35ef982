"""Language models as their authors write them in plain PyTorch: the peers of speed figures; weights load both ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn


class _CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head, self.dropout = heads, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class _MLP(nn.Module):
    def __init__(self, width: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.attn = _CausalSelfAttention(width, heads, dropout, bias)
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = _MLP(width, dropout, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class EagerGPT(nn.Module):
    """GPT-2 with PyTorch's own modules; arguments as GPT's."""

    def __init__(
        self, vocabulary: int, block: int = 256, layers: int = 6, heads: int = 6, width: int = 384, *,
        dropout: float = 0.0, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.block = block
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(vocabulary, width),
                wpe=nn.Embedding(block, width),
                drop=nn.Dropout(dropout),
                h=nn.ModuleList([_Block(width, heads, dropout, bias) for _ in range(layers)]),
                ln_f=nn.LayerNorm(width, bias=bias),
            )
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * layers))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))

    @torch.no_grad()
    def generate(
        self, ids: list[int], pick: Callable[[torch.Tensor], int], end: int, generator: torch.Generator | None = None
    ) -> Iterator[int]:
        """The tokens behind ids, without an end; pick: logits [V] -> token. Past a block, half of it is kept."""
        ids = (ids or [end])[-self.block :]
        while True:
            token = pick(self(torch.tensor([ids]))[0, -1])
            yield token
            ids = [*ids, token]
            if len(ids) > self.block:
                ids = ids[-max(self.block // 2, 1) :]

    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self(idx)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class EagerLSTMLanguageModel(nn.Module):
    """Embedding, LSTM, linear; the hidden state goes on from batch to batch. Arguments as LSTMLanguageModel's."""

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


def language_model_step(model: nn.Module, device: str = "cpu", lr: float = 1e-3) -> Callable[..., torch.Tensor]:
    """zero_grad, loss, backward, step of Adam; returns a function of a batch that does it and returns the loss."""
    model = model.to(device)
    adam = torch.optim.Adam(model.parameters(), lr=lr)

    def step(*batch: torch.Tensor) -> torch.Tensor:
        adam.zero_grad()
        loss = model.loss(*batch)
        loss.backward()
        adam.step()
        return loss.detach()

    return step
