"""The models that the stage "decoding" measures, and the loops around a cache that people write for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.kernels.gpt_decode import layout
from genai_fast.kernels.llama_decode import layout as llama_layout
from genai_fast.models import GPT, Llama
from genai_fast.models.llama.plain import rope_tables
from genai_fast.registry import OPS


@dataclass(frozen=True)
class Model:
    """Sizes of a GPT with new weights, and how many texts it writes side by side."""

    layers: int
    heads: int
    width: int
    vocabulary: int
    block: int
    dtype: torch.dtype = torch.float32
    batch: int = 1
    op: ClassVar[str] = "gpt_decode"

    @property
    def held(self) -> int:
        """Tokens in the cache before the first that is clocked."""
        return self.block // 2

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def make(self, device: str) -> nn.Module:
        torch.manual_seed(0)
        return GPT(self.vocabulary, self.block, self.layers, self.heads, self.width).to(device).eval()

    def prompt(self, device: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (self.batch, self.held), generator=generator).to(device)

    def state(self, device: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The list of the op, rounded as the model's are, and an empty cache of `dtype`."""
        state = self.make(device).to(self.dtype).state_dict()
        weights = [state[name].to(dtype) for name in layout.names(self.layers)]
        return weights, self._cache(self.heads, device, dtype)

    def _cache(self, heads: int, device: str, dtype: torch.dtype) -> torch.Tensor:
        shape = (self.layers, 2, self.batch, heads, self.block, self.width // self.heads)
        return torch.zeros(shape, dtype=dtype, device=device)

    def call(self, ids: torch.Tensor, cache: torch.Tensor, length: int, weights: list[torch.Tensor]) -> torch.Tensor:
        """The loop that people write: ids [B, T] behind `length` tokens -> logits [B, V]."""
        return OPS[self.op].peers["eager"](ids, cache, length, weights, **self._more(cache))

    def cost(self, ids: torch.Tensor, cache: torch.Tensor, length: int, weights: list[torch.Tensor]) -> Any:
        return OPS[self.op].cost(ids, cache, length, weights, **self._more(cache))

    def static(self, weights: list[torch.Tensor], cache: torch.Tensor) -> nn.Module:
        return StaticGPT(weights, cache)

    def _more(self, cache: torch.Tensor) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class LlamaModel(Model):
    """The same of a Llama."""

    kv_heads: int = 1
    op: ClassVar[str] = "llama_decode"

    def make(self, device: str) -> nn.Module:
        torch.manual_seed(0)
        sizes = (self.vocabulary, self.block, self.layers, self.heads, self.width)
        return Llama(*sizes, kv_heads=self.kv_heads).to(device).eval()

    def state(self, device: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
        state, absent = self.make(device).to(self.dtype).state_dict(), torch.empty(0, device=device)
        weights = [state.get(name, absent).to(dtype) for name in llama_layout.names(self.layers)]
        return weights, self._cache(self.kv_heads, device, dtype)

    def static(self, weights: list[torch.Tensor], cache: torch.Tensor) -> nn.Module:
        return StaticLlama(weights, cache, **self._more(cache))

    def _more(self, cache: torch.Tensor) -> dict[str, Any]:
        cos, sin = (t.to(cache) for t in rope_tables(self.block, self.width // self.heads, 10000.0, ""))
        return {"cos": cos, "sin": sin, "heads": self.heads, "windows": [0] * self.layers}


class _Static(nn.Module):
    """A module's parameters and buffers stay where a captured graph expects them."""

    def __init__(self, weights: list[torch.Tensor], cache: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)
        self.register_buffer("cache", cache)


class StaticGPT(_Static):
    def forward(self, ids: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        layers, _, batch, heads, room, head_dim = self.cache.shape
        weights, channels = list(self.weights), heads * head_dim
        seen = (torch.arange(room, device=ids.device) <= place)[None, None, None]
        x = weights[0][ids] + weights[1][place]
        for layer in range(layers):
            first = len(layout.FIRST) + layer * len(layout.LAYER)
            ln_1, ln_1_bias, qkv, qkv_bias, proj, proj_bias, ln_2, ln_2_bias, fc, fc_bias, out, out_bias = weights[
                first : first + len(layout.LAYER)
            ]
            q, k, v = F.linear(F.layer_norm(x, (channels,), ln_1, ln_1_bias), qkv, qkv_bias).chunk(3, -1)
            keys, values = self.cache[layer, 0], self.cache[layer, 1]
            keys.index_copy_(2, place, k.view(batch, heads, 1, head_dim))
            values.index_copy_(2, place, v.view(batch, heads, 1, head_dim))
            h = F.scaled_dot_product_attention(q.view(batch, heads, 1, head_dim), keys, values, attn_mask=seen)
            x = x + F.linear(h.reshape(batch, channels), proj, proj_bias)
            h = F.gelu(F.linear(F.layer_norm(x, (channels,), ln_2, ln_2_bias), fc, fc_bias), approximate="tanh")
            x = x + F.linear(h, out, out_bias)
        return F.linear(F.layer_norm(x, (channels,), *weights[-3:-1]), weights[-1])


class StaticLlama(_Static):
    """For models without biases and norms of heads."""

    def __init__(self, weights: list[torch.Tensor], cache: torch.Tensor, cos, sin, heads: int, windows: Any) -> None:
        super().__init__(weights, cache)
        self.heads = heads
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, ids: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        layers, _, _, _, room, head_dim = self.cache.shape
        weights, cos, sin = list(self.weights), self.cos[place], self.sin[place]
        seen = (torch.arange(room, device=ids.device) <= place)[None, None, None]

        def per_head(x: torch.Tensor, weight: torch.Tensor, turned: bool) -> torch.Tensor:
            y = F.linear(x, weight).view(len(x), -1, 1, head_dim)
            if not turned:
                return y
            a, b = y.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, x.shape[-1:], weight, 1e-5)

        x = weights[0][ids]
        for layer in range(layers):
            first = len(llama_layout.FIRST) + layer * len(llama_layout.LAYER)
            norm_1, q, _, k, _, v, _, _, _, o, _, norm_2, gate, _, up, _, down, _ = weights[
                first : first + len(llama_layout.LAYER)
            ]
            y = norm(x, norm_1)
            keys, values = self.cache[layer, 0], self.cache[layer, 1]
            keys.index_copy_(2, place, per_head(y, k, True))
            values.index_copy_(2, place, per_head(y, v, False))
            h = F.scaled_dot_product_attention(per_head(y, q, True), keys, values, attn_mask=seen, enable_gqa=True)
            x = x + F.linear(h.flatten(1), o)
            y = norm(x, norm_2)
            x = x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)
        return F.linear(norm(x, weights[-2]), weights[-1])
