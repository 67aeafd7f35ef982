"""LLaMA with PyTorch's own modules."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn


def rope_frequencies(dim: int, theta: float, scaling: str) -> torch.Tensor:
    """Radians a position of each pair of channels, [dim / 2] float64.

    scaling: "", "linear:FACTOR", or "llama3:FACTOR,LOW,HIGH,LENGTH": wavelengths above LENGTH / LOW grow by the factor,
    those below LENGTH / HIGH stay, and between the two the frequencies are interpolated.
    """
    frequencies = theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / -dim)
    kind, _, numbers = scaling.partition(":")
    factor, *more = map(float, numbers.split(",")) if numbers else (1.0,)
    if kind == "llama3":
        low, high, length = more
        share = ((length / (2 * math.pi) * frequencies - low) / (high - low)).clamp(0, 1)
        return (1 - share) * frequencies / factor + share * frequencies
    return frequencies / factor


def rope_tables(positions: int, dim: int, theta: float, scaling: str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of each position's angles, [positions, dim / 2] float64."""
    frequencies = rope_frequencies(dim, theta, scaling)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64, device="cpu"), frequencies)
    return angles.cos(), angles.sin()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class _Attention(nn.Module):
    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, window: int, softcap: float, bias: str,
        qk_norm: bool, eps: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.head_dim, self.window, self.softcap, self.groups = head_dim, window, softcap, heads // kv_heads
        self.q_proj = nn.Linear(width, heads * head_dim, bias=bias != "none")
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=bias != "none")
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=bias != "none")
        self.o_proj = nn.Linear(heads * head_dim, width, bias=bias in ("attention", "all"))
        self.q_norm = nn.RMSNorm(head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=eps) if qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        if self.softcap or 0 < self.window < T:
            y = self._with_scores(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups > 1)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def _with_scores(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        at = torch.arange(q.size(2), device=q.device)
        hidden = at > at[:, None]
        if self.window:
            hidden = hidden | (at <= at[:, None] - self.window)
        return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Block(nn.Module):
    def __init__(self, width: int, eps: float, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class PlainLlama(nn.Module):
    """LLaMA with PyTorch's own modules; arguments as Llama's."""

    def __init__(
        self, vocabulary: int, block: int = 256, layers: int = 6, heads: int = 6, width: int = 384, *,
        kv_heads: int = 0, head_dim: int = 0, hidden: int = 0, window: int = 0, full_layers: int = 0,
        softcap: float = 0.0, rope_theta: float = 10000.0, rope_scaling: str = "", norm_eps: float = 1e-5,
        bias: str = "none", qk_norm: bool = False, tied: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.block = block
        head_dim, hidden = head_dim or width // heads, hidden or 32 * math.ceil(width / 12)
        blocks = []
        for layer in range(layers):
            seen = window if layer >= full_layers else 0
            sizes = (width, heads, kv_heads or heads, head_dim)
            attention = _Attention(*sizes, seen, softcap, bias, qk_norm, norm_eps)
            blocks.append(_Block(width, norm_eps, attention, _MLP(width, hidden, bias == "all")))
        parts = {"embed_tokens": nn.Embedding(vocabulary, width), "layers": nn.ModuleList(blocks)}
        self.model = nn.ModuleDict(parts | {"norm": nn.RMSNorm(width, eps=norm_eps)})
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if into_stream else 0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)
        cos, sin = rope_tables(block, head_dim, rope_theta, rope_scaling)
        self.register_buffer("cos", cos.float(), persistent=False)
        self.register_buffer("sin", sin.float(), persistent=False)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        T = idx.size(1)
        x, cos, sin = self.model.embed_tokens(idx), self.cos[:T], self.sin[:T]
        for block in self.model.layers:
            x = block(x, cos, sin)
        return self.lm_head(self.model.norm(x))

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
