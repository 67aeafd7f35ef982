"""A decoder-only Transformer with LLaMA's names, on the fused ops."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from genai_fast import ops
from genai_fast.layers import RMSNorm
from genai_fast.models.common import checks
from genai_fast.models.common.generation import WriteOn
from genai_fast.models.common.language import TiedHead, head_loss
from genai_fast.models.common.protocol import Decoder
from genai_fast.models.common.submodules import norm_of_sum
from genai_fast.models.llama.plain import rope_tables

BIASES = ("none", "qkv", "attention", "all")
_SCALINGS = {"linear": 1, "llama3": 4}  # numbers that follow the name

# (layer, q, k, v), [B, H, T, D] and twice [B, H_kv, T, D] -> [B, H, T, D]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_Call = Callable[..., torch.Tensor]


class LlamaLosses(NamedTuple):
    loss: torch.Tensor  # nats a token, 0-d float32


class _Attention(nn.Module):
    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, bias: str, qk_norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, heads * head_dim, bias=bias != "none")
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=bias != "none")
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=bias != "none")
        self.o_proj = nn.Linear(heads * head_dim, width, bias=bias in ("attention", "all"))
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(head_dim, eps=eps), RMSNorm(head_dim, eps=eps)
        self.qk_norm = qk_norm

    def forward(self, x: torch.Tensor, turn: _Call, attend: _Call) -> torch.Tensor:
        # [B, T, H D] -> [B, T, H, D] each
        q, k, v = (p(x).unflatten(2, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self.o_proj(attend(turn(q), turn(k), v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(ops.gated_act(self.gate_proj(x), self.up_proj(x)))


class _Block(nn.Module):
    """(branch, h) -> (branch, h): what is still to be added to the stream h goes with it into the next norm."""

    def __init__(self, width: int, eps: float, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(width, eps=eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(width, eps=eps)
        self.mlp = mlp

    def forward(
        self, branch: torch.Tensor | None, h: torch.Tensor, turn: _Call, attend: _Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norm = self.input_layernorm
        y, h = (norm(h), h) if branch is None else norm_of_sum(norm, branch, h)
        y, h = norm_of_sum(self.post_attention_layernorm, self.self_attn(y, turn, attend), h)
        return self.mlp(y), h


class Llama(WriteOn, TiedHead):
    """A decoder-only Transformer: pre-norm blocks with RMS norms, rotary positions, grouped queries and SwiGLU.

    Parameters have Hugging Face's names: model.embed_tokens, model.layers.<i>.input_layernorm, .self_attn.q_proj,
    .k_proj, .v_proj, .o_proj, .post_attention_layernorm, .mlp.gate_proj, .up_proj, .down_proj, model.norm and lm_head.

    Args:
        vocabulary: number of token ids.
        block: the most tokens that it sees at once.
        layers, heads, width: blocks, attention heads in each, channels.
        kv_heads: heads of keys and values, a divisor of heads; 0: as many.
        head_dim: channels of a head, even and at most 256; 0: width / heads.
        hidden: hidden channels of the MLP; 0: 8/3 of the width, up to a multiple of 32.
        window: tokens that a token sees, itself among them, in the layers from `full_layers` on; 0: all (Mistral).
        softcap: attention scores become softcap tanh(score / softcap); 0: they stay (Gemma 2).
        rope_theta: base of the rotary embedding's wavelengths.
        rope_scaling: "", "linear:FACTOR", or "llama3:FACTOR,LOW_FREQ_FACTOR,HIGH_FREQ_FACTOR,ORIGINAL_MAX_POSITIONS".
        norm_eps: added to the mean square in norms.
        bias: which linear layers have one: "none", "qkv" (Qwen 2), "attention", or "all".
        qk_norm: whether queries and keys are normalized head by head (Qwen 3).
        tied: whether the embedding is the head's weight.

    Initialised N(0, 0.02), biases 0, projections into the stream N(0, 0.02 / sqrt(2 layers)).
    Under autocast the stream between the blocks stays float32; everything else is in autocast's dtype.
    Raises: ValueError on sizes and settings that do not fit.
    Source: Touvron et al. 2023, arXiv:2302.13971; Jiang et al. 2023 (Mistral), arXiv:2310.06825; Llama 3 2024,
        arXiv:2407.21783; Qwen 2 2024, arXiv:2407.10671; Qwen 3 2025, arXiv:2505.09388.
    """

    embedding = "model.embed_tokens"

    def __init__(
        self, vocabulary: int, block: int = 256, layers: int = 6, heads: int = 6, width: int = 384, *,
        kv_heads: int = 0, head_dim: int = 0, hidden: int = 0, window: int = 0, full_layers: int = 0,
        softcap: float = 0.0, rope_theta: float = 10000.0, rope_scaling: str = "", norm_eps: float = 1e-5,
        bias: str = "none", qk_norm: bool = False, tied: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.positive("Llama", vocabulary=vocabulary, block=block, layers=layers, heads=heads, width=width)
        head_dim = head_dim or _whole_head(width, heads)
        _check(heads, kv_heads, head_dim, bias, rope_scaling, softcap, rope_theta)
        self.vocabulary, self.block, self.heads, self.width = vocabulary, block, heads, width
        self.kv_heads, self.head_dim, self.softcap = kv_heads or heads, head_dim, softcap
        self.hidden = hidden or 32 * math.ceil(width / 12)
        self.windows = tuple(0 if layer < full_layers else window for layer in range(layers))
        self._rope = (block, head_dim, rope_theta, rope_scaling)
        self.rope_theta, self.rope_scaling, self.norm_eps, self.biases = rope_theta, rope_scaling, norm_eps, bias
        sizes = (width, heads, self.kv_heads, head_dim, bias, qk_norm, norm_eps)
        blocks = nn.ModuleList(
            _Block(width, norm_eps, _Attention(*sizes), _MLP(width, self.hidden, bias == "all")) for _ in range(layers)
        )
        parts = {"embed_tokens": nn.Embedding(vocabulary, width), "layers": blocks}
        self.model = nn.ModuleDict({**parts, "norm": RMSNorm(width, eps=norm_eps)})
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.tie_head()
        self._make_tables()
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if into_stream else 0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, block: int | None = None) -> Llama:
        """The model of a Hugging Face folder of a Llama, Mistral, Qwen 2 or Qwen 3, on the CPU in float32.

        Args:
            folder: with config.json, which decides, and model.safetensors or its parts and their index; nothing in it
                is executed.
            block: the most tokens at once, up to max_position_embeddings; None: that.

        Raises:
            UsageError: files cannot be read or do not fit together, or config.json has a setting that this model does
                not honour.
        """
        from genai_fast.models.llama import pretrained  # a model that reads no file does without data's modules

        return pretrained.made(Path(folder), block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T], int64 (or int32), T <= block -> logits [B, T, V] of the token after each."""
        return self.lm_head(self._features(x))

    def training_step(self, x: torch.Tensor, y: torch.Tensor) -> LlamaLosses:
        """The cross-entropy of y [B, T] given x [B, T], both int64; positions where y is -100 do not count."""
        return LlamaLosses(head_loss(self.lm_head, self._features(x), y, self.vocabulary))

    def run(self, x: torch.Tensor, positions: torch.Tensor | None, attend: Attend) -> torch.Tensor:
        """Ids [B, T] at positions [B, T] (None: 0 to T - 1) -> what the head multiplies, [B, T, C].

        `attend` is the attention of each layer: here generation keeps its keys and values.
        """
        turn = functools.partial(ops.rotary, cos=self.cos, sin=self.sin, positions=positions)
        branch, h = None, self.model.embed_tokens(x)
        for layer, block in enumerate(self.model.layers):
            branch, h = block(branch, h, turn, functools.partial(attend, layer))
        return norm_of_sum(self.model.norm, branch, h)[0]

    def scores(self, layer: int) -> dict[str, Any]:
        """Settings of a layer's attention, as `ops.causal_attention` takes them."""
        return {"window": self.windows[layer] or None, "softcap": self.softcap or None}

    def check_ids(self, x: torch.Tensor) -> None:
        """x is [B, T] of ids with 1 <= T <= block; the ids themselves are looked at on the CPU alone."""
        checks.text("Llama", x, self.vocabulary, self.block)

    def cached_decoder(self, batch: int, weights: str = "float32") -> Decoder:
        """See `models.decoder_for`."""
        from genai_fast.models.llama.decoding import cached_decoder  # which knows this class

        return cached_decoder(self, batch, weights)

    def shards(self) -> list[list[nn.Module]]:
        """The modules whose weights, gradients and optimizer state are divided together among processes."""
        return [[block.self_attn, block.mlp] for block in self.model.layers]

    def extra_repr(self) -> str:
        return (
            f"vocabulary={self.vocabulary}, block={self.block}, layers={len(self.windows)}, heads={self.heads},"
            f" kv_heads={self.kv_heads}, width={self.width}"
        )

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        self.check_ids(x)
        return self.run(x, None, lambda layer, *qkv: ops.causal_attention(*qkv, **self.scores(layer)))

    def _make_tables(self) -> None:
        """cos and sin of all positions, in float32, or in float64 as the weights are."""
        weight = self.model.embed_tokens.weight
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        for name, table in zip(("cos", "sin"), rope_tables(*self._rope), strict=True):
            self.register_buffer(name, table.to(weight.device, dtype), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Llama:
        """Positions are exact in a narrow model, too, and in one that was made without memory."""
        before = self.cos
        super()._apply(fn, recurse)
        if before.is_meta or self.cos.dtype is not before.dtype:
            self._make_tables()
        return self


def _whole_head(width: int, heads: int) -> int:
    if width % heads:
        raise ValueError(f"Llama: heads: expected a divisor of width={width}, got {heads}; or name head_dim")
    return width // heads


def _check(
    heads: int, kv_heads: int, head_dim: int, bias: str, scaling: str, softcap: float, rope_theta: float
) -> None:
    if kv_heads < 0 or heads % (kv_heads or heads):
        raise ValueError(f"Llama: kv_heads: expected a divisor of heads={heads}, got {kv_heads}")
    if head_dim % 2 or not 2 <= head_dim <= 256:
        raise ValueError(
            f"Llama: head_dim: expected an even number of channels from 2 to 256, got {head_dim}; set head_dim"
        )
    if bias not in BIASES:
        raise ValueError(f"Llama: bias: expected {', '.join(BIASES)}, got {bias!r}")
    for name, value, good in (("softcap", softcap, softcap >= 0), ("rope_theta", rope_theta, rope_theta > 0)):
        if not (good and math.isfinite(value)):
            raise ValueError(f"Llama: {name}: expected a finite number above 0, got {value}")
    if not scaling:
        return
    kind, _, numbers = scaling.partition(":")
    try:
        found = [float(number) for number in numbers.split(",")]
    except ValueError:
        found = []
    if len(found) != _SCALINGS.get(kind) or min(found) <= 0 or (kind == "llama3" and found[2] <= found[1]):
        raise ValueError(
            f"Llama: rope_scaling: expected linear:FACTOR or llama3:FACTOR,LOW_FREQ_FACTOR,HIGH_FREQ_FACTOR,"
            f"ORIGINAL_MAX_POSITIONS, got {scaling!r}"
        )
