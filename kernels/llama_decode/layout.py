"""The weights of a Llama as one list, and what they must be. Absent biases and norms are empty."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from genai_fast.kernels.common import narrow
from genai_fast.kernels.common.narrow import MATRIX_DTYPES

# Of layer i: model.layers.<i>.<name>. Matrices have the orientation of nn.Linear, [out, in].
LAYER = (
    "input_layernorm.weight",
    *(f"self_attn.{side}_proj.{kind}" for side in "qkv" for kind in ("weight", "bias")),
    "self_attn.q_norm.weight", "self_attn.k_norm.weight", "self_attn.o_proj.weight", "self_attn.o_proj.bias",
    "post_attention_layernorm.weight",
    *(f"mlp.{side}_proj.{kind}" for side in ("gate", "up", "down") for kind in ("weight", "bias")),
)  # fmt: skip
FIRST = ("model.embed_tokens.weight",)
LAST = ("model.norm.weight", "lm_head.weight")
ABSENT = (".bias", "q_norm.weight", "k_norm.weight")  # endings of what a model may lack
CACHE_DTYPES = (torch.float32, torch.bfloat16)


class Sizes(NamedTuple):
    """Of a model: vocabulary, channels, channels of queries, of keys and of a head, hidden channels, layers."""

    vocabulary: int
    channels: int
    queries: int
    keys: int
    head_dim: int
    hidden: int
    layers: int


def names(layers: int) -> tuple[str, ...]:
    """Hugging Face's name of each weight, in the order of the list."""
    return (*FIRST, *(f"model.layers.{i}.{name}" for i in range(layers) for name in LAYER), *LAST)


def is_matrix(name: str) -> bool:
    """Whether products read it, so that it may be narrow: the token embedding, all Linears, the head."""
    return name in (FIRST[0], LAST[1]) or name.endswith("_proj.weight")


def shapes(size: Sizes) -> tuple[tuple[int, ...], ...]:
    """Of each weight of the list, if it is there."""
    c, q, k, h, d = size.channels, size.queries, size.keys, size.hidden, size.head_dim
    layer = ((c,), (q, c), (q,), (k, c), (k,), (k, c), (k,), (d,), (d,), (c, q), (c,), (c,))
    layer += ((h, c), (h,), (h, c), (h,), (c, h), (c,))
    return ((size.vocabulary, c), *(layer * size.layers), (c,), (size.vocabulary, c))


def matrices(layers: int) -> tuple[int, ...]:
    """Where the list holds matrices."""
    return tuple(k for k, name in enumerate(names(layers)) if is_matrix(name))


# For calls at every token. (torch.compile, which sees the others, warns of caches.)
_matrices = functools.cache(matrices)


@functools.cache
def _expected(
    size: Sizes, matrix: torch.dtype, wide: torch.dtype
) -> tuple[list[torch.Size], list[bool], list[torch.dtype]]:
    """Shapes, whether absent ones do, and dtypes of the list."""
    every = names(size.layers)
    kinds = [matrix if is_matrix(name) else wide for name in every]
    return [torch.Size(shape) for shape in shapes(size)], [name.endswith(ABSENT) for name in every], kinds


def layers_of(weights: Sequence[torch.Tensor]) -> int:
    layers, rest = divmod(len(weights) - len(FIRST) - len(LAST), len(LAYER))
    if layers < 0 or rest:
        raise ValueError(f"genai_fast: expected 3 tensors and {len(LAYER)} for each layer, got {len(weights)}")
    return layers


def sizes_of(weights: Sequence[torch.Tensor], head_dim: int) -> Sizes:
    """The sizes that the list's first tensors say; `require` compares the others with them."""
    layers = layers_of(weights)
    if any(weights[k].dim() != 2 for k in _matrices(layers)[:6]):
        raise ValueError("genai_fast: expected matrices [out, in], got tensors of other dimensions")

    def rows(name: str) -> int:
        return weights[len(FIRST) + LAYER.index(name)].size(0) if layers else head_dim

    q, k, hidden = (rows(f"{name}_proj.weight") for name in ("self_attn.q", "self_attn.k", "mlp.gate"))
    return Sizes(*weights[0].shape, q, k, head_dim, hidden, layers)


def require(cache, ids, length, weights, scales, cos, sin, heads, windows) -> Sizes:
    """Raise unless all fits: kernels read by address.

    The public op has checked already, with better words; this is for calls of torch.ops.genai_fast itself.
    """
    if cache.dim() != 6 or ids.dim() != 2 or cos.dim() != 2:
        raise ValueError("genai_fast: expected a cache [L, 2, B, H_kv, T_max, D], ids [B, T] and cos [P, D / 2]")
    size = sizes_of(weights, cache.size(5))
    dtype, where, on_cpu = weights[0].dtype, _matrices(size.layers), cache.is_cpu
    wide = torch.float64 if cache.dtype is torch.float64 else torch.float32
    expected, may_lack, kinds = _expected(size, dtype, wide)
    for k, w in enumerate(weights):
        lacks = may_lack[k] and w.numel() == 0
        if not lacks and (w.shape != expected[k] or w.dtype is not kinds[k] or not w.is_contiguous()):
            raise ValueError(
                f"genai_fast: expected contiguous {kinds[k]} {tuple(expected[k])}, got {w.dtype} {tuple(w.shape)}"
            )
        if w.is_cpu != on_cpu:
            raise ValueError(f"genai_fast: expected weights on {cache.device}, got one on {w.device}")
    if len(scales) != (len(where) if dtype is torch.int8 else 0):
        raise ValueError(f"genai_fast: expected a scale for each of {len(where)} int8 matrices, got {len(scales)}")
    for k, s in zip(where, scales, strict=False):
        if s.shape != weights[k].shape[:1] or s.dtype is not wide or s.is_cpu != on_cpu or not s.is_contiguous():
            raise ValueError(f"genai_fast: expected {wide} of {weights[k].size(0)} rows, got {s.dtype} {s.shape}")
    _require_rest(cache, ids, length, cos, sin, heads, windows, size)
    return size


def _require_rest(cache, ids, length, cos, sin, heads, windows, size) -> None:
    (batch, tokens), head_dim, kv_heads = ids.shape, size.head_dim, cache.size(3)
    wide = torch.float64 if cache.dtype is torch.float64 else torch.float32
    tables = all(
        t.dtype is wide and t.is_contiguous() and t.shape == cos.shape and t.is_cpu == cache.is_cpu for t in (cos, sin)
    )
    fits = (
        size.channels > 0 and size.hidden > 0 and head_dim > 0 and head_dim % 2 == 0 and kv_heads > 0
        and cache.shape[:3] == (size.layers, 2, batch) and cache.is_contiguous()
        and cache.dtype in (*CACHE_DTYPES, torch.float64)
        and heads > 0 and heads % kv_heads == 0 and tables and cos.size(1) * 2 == head_dim
        and (size.layers == 0 or (heads * head_dim == size.queries and kv_heads * head_dim == size.keys))
        and ids.dtype is torch.int64 and ids.is_cpu == cache.is_cpu and tokens > 0
        and len(windows) == size.layers and 0 <= length <= min(cache.size(4), cos.size(0)) - tokens
    )  # fmt: skip
    if not fits:
        raise ValueError(
            f"genai_fast: expected int64 ids [B, T], a cache [{size.layers}, 2, B, H_kv, T_max, D] and tables"
            f" [T_max, D / 2] with room for {tokens} tokens behind {length}, and a window for each layer, got"
            f" {ids.dtype} {tuple(ids.shape)}, {cache.dtype} {tuple(cache.shape)}, {tuple(cos.shape)}, {len(windows)}"
        )


def narrowed(
    weights: Sequence[torch.Tensor], dtype: torch.dtype, wide: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """See `narrow.narrowed`; a tied head stays one with the embedding."""
    return narrow.narrowed(weights, _matrices(layers_of(weights)), dtype, wide)


__all__ = ["ABSENT", "CACHE_DTYPES", "FIRST", "LAST", "LAYER", "MATRIX_DTYPES", "Sizes", "narrowed", "require"]
