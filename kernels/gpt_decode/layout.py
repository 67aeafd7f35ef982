"""The weights of a GPT-2 as one list, and what they must be."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from genai_fast.kernels.common import narrow
from genai_fast.kernels.common.narrow import MATRIX_DTYPES, span

__all__ = ["FIRST", "LAST", "LAYER", "MATRIX_DTYPES", "Sizes", "span"]

# Of layer i: transformer.h.<i>.<name>. Matrices have the orientation of nn.Linear, [out, in].
LAYER = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip
FIRST = ("transformer.wte.weight", "transformer.wpe.weight")
LAST = ("transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight")


class Sizes(NamedTuple):
    """Of a model: vocabulary, channels, positions, layers, hidden channels of the MLP."""

    vocabulary: int
    channels: int
    positions: int
    layers: int
    hidden: int


def names(layers: int) -> tuple[str, ...]:
    """GPT-2's name of each weight, in the order of the list."""
    return (*FIRST, *(f"transformer.h.{i}.{name}" for i in range(layers) for name in LAYER), *LAST)


def is_matrix(name: str) -> bool:
    """Whether products read it, so that it may be narrow: the token embedding, all Linears, the head."""
    return name == FIRST[0] or name == LAST[2] or (name.endswith(".weight") and ".c_" in name)


def shapes(size: Sizes) -> tuple[tuple[int, ...], ...]:
    """Of each weight of the list."""
    c, h = size.channels, size.hidden
    layer = ((c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c,), (c,), (h, c), (h,), (c, h), (c,))
    return ((size.vocabulary, c), (size.positions, c), *(layer * size.layers), (c,), (c,), (size.vocabulary, c))


def matrices(layers: int) -> tuple[int, ...]:
    """Where the list holds matrices."""
    return tuple(k for k, name in enumerate(names(layers)) if is_matrix(name))


# For calls at every token. (torch.compile, which sees the others, warns of caches.)
_matrices = functools.cache(matrices)


@functools.cache
def _expected(size: Sizes, matrix: torch.dtype, wide: torch.dtype) -> tuple[list[torch.Size], list[torch.dtype]]:
    """Shapes and dtypes of the list."""
    kinds = [matrix if is_matrix(name) else wide for name in names(size.layers)]
    return [torch.Size(shape) for shape in shapes(size)], kinds


def sizes_of(weights: Sequence[torch.Tensor]) -> Sizes:
    """The sizes that the list's first tensors say; `require` compares the others with them."""
    layers, rest = divmod(len(weights) - len(FIRST) - len(LAST), len(LAYER))
    if layers < 0 or rest or weights[0].dim() != 2 or weights[1].dim() != 2:
        raise ValueError(f"genai_fast: expected 5 tensors and {len(LAYER)} for each layer, got {len(weights)}")
    hidden = weights[len(FIRST) + LAYER.index("mlp.c_fc.weight")].size(0) if layers else 0
    return Sizes(*weights[0].shape, weights[1].size(0), layers, hidden)


def require(cache, ids, length, weights, scales) -> Sizes:
    """Raise unless all fits: kernels read by address.

    The public op has checked already, with better words; this is for calls of torch.ops.genai_fast itself.
    """
    size = sizes_of(weights)
    dtype, where, on_cpu = weights[0].dtype, _matrices(size.layers), cache.is_cpu
    wide = torch.float64 if cache.dtype is torch.float64 else torch.float32
    expected, kinds = _expected(size, dtype, wide)
    if (
        [w.shape for w in weights] != expected
        or [w.dtype for w in weights] != kinds
        or not all([w.is_cpu == on_cpu and w.is_contiguous() for w in weights])
    ):
        wrong = next(
            k
            for k, w in enumerate(weights)
            if w.shape != expected[k] or w.dtype is not kinds[k] or w.is_cpu != on_cpu or not w.is_contiguous()
        )
        raise ValueError(
            f"genai_fast: expected contiguous {kinds[wrong]} {tuple(expected[wrong])} on {cache.device}, got"
            f" {weights[wrong].dtype} {tuple(weights[wrong].shape)} on {weights[wrong].device}"
        )
    if len(scales) != (len(where) if dtype is torch.int8 else 0):
        raise ValueError(f"genai_fast: expected a scale for each of {len(where)} int8 matrices, got {len(scales)}")
    for k, s in zip(where, scales, strict=False):
        if s.shape != weights[k].shape[:1] or s.dtype is not wide or s.is_cpu != on_cpu or not s.is_contiguous():
            raise ValueError(f"genai_fast: expected {wide} of {weights[k].size(0)} rows, got {s.dtype} {s.shape}")
    batch, tokens = ids.shape
    if size.channels < 1:
        raise ValueError(f"gpt_decode: weights: expected at least one channel, got {tuple(weights[0].shape)}")
    fits = (
        size.channels > 0 and cache.dim() == 6 and cache.size(3) > 0
        and cache.shape[:3] == (size.layers, 2, batch) and cache.is_contiguous()
        and cache.size(3) * cache.size(5) == size.channels and cache.dtype is wide
        and ids.dtype is torch.int64 and ids.is_cpu == on_cpu and tokens > 0
        and 0 <= length <= min(cache.size(4), size.positions) - tokens
    )  # fmt: skip
    if not fits:
        raise ValueError(
            f"genai_fast: expected int64 ids [B, T] and a cache [{size.layers}, 2, B, H, T_max, D] of {wide} with room"
            f" for {tokens} tokens behind {length}, got {ids.dtype} {tuple(ids.shape)} and {cache.dtype}"
            f" {tuple(cache.shape)}"
        )
    return size


def narrowed(
    weights: Sequence[torch.Tensor], dtype: torch.dtype, wide: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """See `narrow.narrowed`; a tied head stays one with the embedding."""
    return narrow.narrowed(weights, matrices((len(weights) - len(FIRST) - len(LAST)) // len(LAYER)), dtype, wide)
