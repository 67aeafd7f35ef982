"""Generating text with a GPT-2: new tokens through all layers in one call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from genai_fast.backends import forced_backend
from genai_fast.kernels.gpt_decode import layout
from genai_fast.ops import checks
from genai_fast.ops.dispatch import library_call, transformed
from genai_fast.ops.text_decoder import DTYPES, TextDecoder, check_ids, check_room, in_order, positive_sizes

_OP, _CLASS = "gpt_decode", "GPTDecoder"
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # masks, which some files hold


def gpt_decode(
    ids: torch.Tensor,
    cache: torch.Tensor,
    length: int,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor] = (),
    *,
    eps: float = 1e-5,
    every: bool = False,
) -> torch.Tensor:
    """Appends tokens to a GPT-2's cache of keys and values, and gives the logits after the last one.

    x = wte[id] + wpe[position]; each layer x += c_proj(attention(ln_1 x)), x += mlp.c_proj(gelu(c_fc(ln_2 x))), GELU by
    tanh; logits = lm_head(ln_f x). A token gives the same bits alone, in a batch, and as part of a prompt.

    GPTDecoder makes `weights` from a state dict, and keeps the cache.

    Args:
        ids: int64 [B, T], the new tokens; all samples hold equally many.
        cache: float32 (or float64) [L, 2, B, H, T_max, D], contiguous: keys and values of each layer; updated in place.
        length: tokens that it holds already.
        weights: one list: wte [V, C], wpe [P, C]; for each layer ln_1 (weight, bias), attn.c_attn [3 C, C] and bias,
            attn.c_proj [C, C] and bias, ln_2 (both), mlp.c_fc [F, C] and bias, mlp.c_proj [C, F] and bias; ln_f (both),
            lm_head [V, C]. Contiguous. wte, lm_head and the layers' matrices are float32, bfloat16 or int8, all alike;
            the rest has the cache's dtype. Absent biases are zeros.
        scales: of int8 matrices, in the order of the list: a factor [out] for each row. Else empty.
        eps: of the layer norms.
        every: give the logits after each of the tokens, [B, T, V].

    Returns: logits [B, V] of the cache's dtype.
    Gradients: none; tensors that require one are refused unless gradients are off (torch.no_grad()).
    Backends: C++ (CPU), reference (elsewhere, and float64).
    Raises: TypeError, ValueError on arguments that do not fit, before anything is changed.
    Source: Radford et al. 2019, Language models are unsupervised multitask learners (GPT-2).
    """
    weights, scales = list(weights), list(scales)
    eps = checks.real(_OP, "eps", eps, "a finite float >= 0", 0.0)
    # Looking for what is wrong takes longer than a token of a small model.
    if transformed() or not _fits(cache, ids, length, weights, scales):
        _check_all(cache, ids, length, weights, scales)
    if torch.is_grad_enabled() and any([w.requires_grad for w in weights]):
        name = layout.names(len(weights) // len(layout.LAYER))[[w.requires_grad for w in weights].index(True)]
        raise ValueError(
            f"{_OP}: weights: {name}: expected a tensor that needs no gradient, got one that requires it; decode under"
            f" torch.no_grad()"
        )
    checks.needs_no_gradient(_OP, "cache", (cache, *scales))
    with torch.no_grad():
        return library_call(_OP, cache, ids, int(length), weights, scales, eps, bool(every), forced_backend())


def _fits(cache: Any, ids: Any, length: Any, weights: list[Any], scales: list[Any]) -> bool:
    try:
        size = layout.require(cache, ids, length, weights, scales)
        least, most = layout.span(ids) if ids.numel() else (0, 0)
        return least >= 0 and most < size.vocabulary and type(length) is int
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # whatever was given in their place
        return False


def _check_all(cache: Any, ids: Any, length: Any, weights: list[Any], scales: list[Any]) -> None:
    checks.is_floating(_OP, "cache", cache)
    if cache.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{_OP}: cache: expected torch.float32 or torch.float64, got {cache.dtype}; convert it")
    size = _check_weights(_OP, weights, cache.dtype)
    for name, x in zip(layout.names(size.layers), weights, strict=True):
        checks.same_device(_OP, f"weights: {name}", x, "cache", cache)
    _check_scales(weights, scales, cache.dtype)
    check_ids(_OP, ids, size.vocabulary, cache.device)
    held = checks.number(length)
    if held is None or isinstance(held, float) or held < 0:
        raise ValueError(f"{_OP}: length: expected an int >= 0, the tokens that the cache holds, got {length!r}")
    if cache.dim() != 6 or cache.shape[:3] != (size.layers, 2, ids.size(0)) or not cache.is_contiguous():
        raise ValueError(
            f"{_OP}: cache: expected contiguous [{size.layers}, 2, {ids.size(0)}, H, T_max, D], got shape"
            f" {tuple(cache.shape)}; make it with torch.empty"
        )
    if min(size.channels, cache.size(3)) < 1:
        raise ValueError(
            f"{_OP}: cache: expected at least 1 head and 1 channel, got {cache.size(3)} heads and {size.channels}"
            f" channels"
        )
    if cache.size(3) * cache.size(5) != size.channels:
        raise ValueError(
            f"{_OP}: cache: expected heads times head_dim to be {size.channels} as wte has columns, got"
            f" {cache.size(3)} x {cache.size(5)}"
        )
    check_room(_OP, held, ids.size(1), min(cache.size(4), size.positions))


class GPTDecoder(TextDecoder):
    """A GPT-2 with its cache, ready to decode on a CPU: `prefill` the prompt, then `step` by step.

    Weights are read where they lie if they have the dtype asked for (float32 ones of a model in float32: no copy is
    made); others are converted once. If they change (a training step, load_state_dict), `reset` takes the new ones up;
    continuing with a cache that the old ones made raises. A parameter that is replaced rather than written to
    (`.data = `, load_state_dict(assign=True)) is not seen: make a new decoder, or keep its tensors and call `refresh`.

    Args:
        weights: by GPT-2's names, as a state_dict has them (transformer.wte.weight, transformer.h.0.ln_1.weight, ...);
            matrices [out, in] as nn.Linear's. lm_head.weight may be absent (tied to wte), and so may any bias.
        heads: of the attention; divides the channels.
        block: tokens that the cache has room for, at most the rows of wpe.
        batch: samples that are decoded side by side, all with equally many tokens.
        dtype: of the matrices: "float32"; "bfloat16", half the memory and time; "int8", a quarter, with a factor for
            each row. All else is float32, and so are sums.
        eps: of the layer norms.

    Attributes:
        length: tokens that the cache holds.
        block, batch, vocabulary: as above.

    Raises: TypeError, ValueError where weights do not fit; naming the key, what was expected and what came.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        heads: int,
        block: int,
        batch: int = 1,
        dtype: str = "float32",
        eps: float = 1e-5,
    ) -> None:
        checks.one_of(_CLASS, "dtype", dtype, tuple(DTYPES))
        heads, block, batch = positive_sizes(_CLASS, heads=heads, block=block, batch=batch)
        self._given, self._sources = _in_order(weights)
        size = _check_weights(_CLASS, self._given)
        if size.channels % heads:
            raise ValueError(f"{_CLASS}: heads: expected a divisor of {size.channels} channels, got {heads}")
        if block > size.positions:
            raise ValueError(
                f"{_CLASS}: block: expected at most {size.positions} as transformer.wpe.weight has rows, got {block}"
            )
        self.block, self.batch, self.vocabulary = block, batch, size.vocabulary
        self._dtype, self._eps = DTYPES[dtype], checks.real(_CLASS, "eps", eps, "a finite float >= 0", 0.0)
        self._cache = torch.empty(size.layers, 2, batch, heads, block, size.channels // heads)
        self.refresh()

    def __repr__(self) -> str:
        layers, _, batch, heads, block, head_dim = self._cache.shape
        dtype = str(self._dtype).removeprefix("torch.")
        return (
            f"{_CLASS}({layers} layers x {heads * head_dim}, {heads} heads, vocabulary {self.vocabulary}, {dtype},"
            f" {self.length} of {block} tokens, batch {batch})"
        )

    def _narrowed(self) -> None:
        self._weights, self._scales = layout.narrowed(self._given, self._dtype)

    def _logits(self, ids: torch.Tensor, every: bool) -> torch.Tensor:
        arguments = (self._cache, ids, self.length, self._weights, self._scales, self._eps, every)
        return library_call(_OP, *arguments, forced_backend())


def _in_order(weights: Mapping[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The list of layout.py, and those of its tensors whose changes can be seen."""
    prefix = "transformer.h."
    layers = {name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)}
    names = layout.names(len(layers))
    unknown = [name for name in weights if name not in names and not name.endswith(_BUFFERS)]
    if unknown:
        raise ValueError(
            f"{_CLASS}: weights: expected GPT-2's names (transformer.wte.weight, transformer.h.0.ln_1.weight, ...,"
            f" transformer.h.{max(len(layers) - 1, 0)}.mlp.c_proj.bias, lm_head.weight), got {unknown[0]!r}"
            f"{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}; rename or leave out"
        )
    # A bias is as long as its matrix has rows, or its norm has channels.
    return in_order(
        _CLASS, weights, names, lambda n, before: torch.zeros(before.shape[:1]) if n.endswith(".bias") else None
    )


def _check_weights(op: str, weights: list[torch.Tensor], wide: torch.dtype | None = None) -> layout.Sizes:
    """Shapes, and for the op dtypes and layout too: `wide` is that of the cache."""
    least = len(layout.FIRST) + len(layout.LAST)
    if len(weights) < least or (len(weights) - least) % len(layout.LAYER):
        raise ValueError(
            f"{op}: weights: expected {least} tensors and {len(layout.LAYER)} for each layer, got {len(weights)};"
            f" GPTDecoder makes the list from a state dict"
        )
    names = layout.names((len(weights) - least) // len(layout.LAYER))
    for name, w in zip(names, weights, strict=True):
        if not isinstance(w, torch.Tensor):
            raise TypeError(f"{op}: weights: {name}: expected a tensor, got {type(w).__name__}")
        matrix = layout.is_matrix(name) or name in layout.FIRST
        if w.dim() != 1 + matrix:
            form = "a matrix [out, in]" if matrix else "a vector"
            raise ValueError(f"{op}: weights: {name}: expected {form}, got shape {tuple(w.shape)}")
    size = layout.sizes_of(weights)
    kind = weights[0].dtype
    for name, w, shape in zip(names, weights, layout.shapes(size), strict=True):
        if w.shape != shape:
            turned = w.dim() == 2 and tuple(reversed(w.shape)) == shape
            remedy = "transpose it: nn.Linear's are [out, in]" if turned else "weights must be of one model"
            raise ValueError(f"{op}: weights: {name}: expected shape {shape}, got {tuple(w.shape)}; {remedy}")
        if wide is None:
            continue
        allowed = (wide, *layout.MATRIX_DTYPES[1:]) if name == layout.FIRST[0] else (kind,)
        if not layout.is_matrix(name):
            allowed = (wide,)
        if w.dtype not in allowed:
            raise TypeError(
                f"{op}: weights: {name}: expected {' or '.join(map(str, allowed))}, got {w.dtype}; matrices are alike,"
                f" the rest is as the cache"
            )
        if not w.is_contiguous():
            raise ValueError(f"{op}: weights: {name}: expected a contiguous tensor, got strides {w.stride()}")
    return size


def _check_scales(weights: list[torch.Tensor], scales: list[torch.Tensor], wide: torch.dtype) -> None:
    where = layout.matrices(layout.sizes_of(weights).layers)
    expected = len(where) if weights[0].dtype is torch.int8 else 0
    if len(scales) != expected:
        raise ValueError(
            f"{_OP}: scales: expected {expected} tensors, one for each int8 matrix, got {len(scales)}; leave them out"
            f" for other dtypes"
        )
    for k, s in zip(where, scales, strict=False):
        if s.shape != weights[k].shape[:1] or s.dtype is not wide or not s.is_contiguous():
            raise ValueError(
                f"{_OP}: scales: expected contiguous {wide} ({weights[k].size(0)},) as its matrix has rows, got"
                f" {s.dtype} {tuple(s.shape)}"
            )
