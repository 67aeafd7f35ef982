"""The encoder-decoder Transformer with PyTorch's own modules."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
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
        self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x), mask=mask, is_causal=memory is not None))
        if memory is not None:
            x = x + self.dropout(self.cross(self.norm_cross(x), memory, memory_mask))
        h = F.gelu(self.feed["up"](self.norm_2(x)), approximate="tanh")
        return x + self.dropout(self.feed["down"](h))


class PlainSeq2Seq(nn.Module):
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

    def forward(self, source: Tensor, source_lengths: Tensor, ids: Tensor) -> Tensor:
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
        self, ids: list[int], pick: Callable[[Tensor], int], end: int, generator: torch.Generator | None = None
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

    def loss(self, source: Tensor, source_lengths: Tensor, target: Tensor, target_lengths: Tensor) -> Tensor:
        start = torch.full((target.size(0), 1), self.end, device=target.device)
        logits = self(source, source_lengths, torch.cat([start, target[:, :-1]], dim=1))
        padding = torch.arange(target.size(1), device=target.device) >= target_lengths[:, None]
        labels = target.masked_fill(padding, -100)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-100)
