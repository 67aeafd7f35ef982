"""Generating text with a Llama: new tokens through all layers in one call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from genai_fast.backends import forced_backend
from genai_fast.kernels.llama_decode import layout
from genai_fast.ops import checks
from genai_fast.ops.dispatch import library_call
from genai_fast.ops.text_decoder import DTYPES, TextDecoder, check_ids, check_room, in_order, positive_sizes

_OP, _CLASS = "llama_decode", "LlamaDecoder"
CACHES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def llama_decode(
    ids: torch.Tensor,
    cache: torch.Tensor,
    length: int,
    weights: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    heads: int,
    windows: Sequence[int],
    scales: Sequence[torch.Tensor] = (),
    softcap: float = 0.0,
    eps: float = 1e-5,
    every: bool = False,
) -> torch.Tensor:
    """Appends tokens to a Llama's cache of keys and values, and gives the logits after the last one.

    x = embedding[id]; each layer x += o(attention(norm x)), x += down(silu(gate(norm x)) up(norm x)); logits =
    head(norm x). Norms are RMS norms; queries and keys are turned by their positions, after a norm of each head if the
    model has such. A token gives the same bits alone, in a batch, and as part of a prompt.

    LlamaDecoder makes `weights` from a state dict, and keeps the cache.

    Args:
        ids: int64 [B, T], the new tokens; all samples hold equally many.
        cache: float32, bfloat16 (or float64) [L, 2, B, H_kv, T_max, D], contiguous: keys and values of each layer;
            updated in place.
        length: tokens that it holds already.
        weights: one list: embed_tokens [V, C]; for each layer input_layernorm [C], q_proj [H D, C], k_proj and v_proj
            [H_kv D, C], each with its bias, q_norm and k_norm [D], o_proj [C, H D] and bias, post_attention_layernorm
            [C], gate_proj and up_proj [F, C] and down_proj [C, F], each with its bias; norm [C], lm_head [V, C].
            Absent biases and norms of heads are empty tensors. Contiguous. embed_tokens, lm_head and the layers'
            matrices are float32, bfloat16 or int8, all alike; the rest is float32 (float64 with such a cache).
        cos, sin: float32 [P, D / 2], P >= length + T, as of `rotary_tables`; pair i is channels i and D / 2 + i.
        heads: of queries; H_kv divides it.
        windows: of each layer, tokens that a token sees, with itself; 0: all.
        scales: of int8 matrices, in the order of the list: a factor [out] for each row. Else empty.
        softcap: scores become softcap tanh(score / softcap); 0: they stay.
        eps: of the norms.
        every: give the logits after each of the tokens, [B, T, V].

    Returns: logits [B, V], float32 (float64 with such a cache).
    Gradients: none; tensors that require one are refused unless gradients are off (torch.no_grad()).
    Backends: C++ (CPU), reference (elsewhere, and float64).
    Raises: TypeError, ValueError on arguments that do not fit, before anything is changed.
    Source: Touvron et al. 2023, arXiv:2302.13971; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
    """
    weights, scales = list(weights), list(scales)
    eps = checks.real(_OP, "eps", eps, "a finite float >= 0", 0.0)
    softcap = checks.real(_OP, "softcap", softcap, "a finite float >= 0", 0.0)
    heads = checks.integer(_OP, "heads", heads, 1)
    windows = [checks.integer(_OP, "windows", window, 0) for window in windows]
    _check_cache(cache, ids, cos, sin, heads)
    check_ids(_OP, ids, weights[0].size(0), cache.device)
    held = checks.number(length)
    if held is None or isinstance(held, float) or held < 0:
        raise ValueError(f"{_OP}: length: expected an int >= 0, the tokens that the cache holds, got {length!r}")
    check_room(_OP, held, ids.size(1), min(cache.size(4), cos.size(0)))
    check_weights(_OP, weights, cache.size(5))
    checks.needs_no_gradient(_OP, "weights", (cache, *weights, *scales))
    arguments = (cache, ids, int(length), weights, scales, cos, sin, heads, windows, softcap, eps, bool(every))
    try:
        layout.require(*arguments[:7], heads, windows)
    except ValueError as error:
        raise ValueError(f"{_OP}: {str(error).removeprefix('genai_fast: ')}") from None
    with torch.no_grad():
        return library_call(_OP, *arguments, forced_backend())


def _check_cache(cache: Any, ids: Any, cos: Any, sin: Any, heads: int) -> None:
    checks.is_floating(_OP, "cache", cache)
    if cache.dtype not in (*layout.CACHE_DTYPES, torch.float64):
        raise TypeError(f"{_OP}: cache: expected float32, bfloat16 or float64, got {cache.dtype}; convert it")
    if cache.dim() != 6 or not cache.is_contiguous() or (isinstance(ids, torch.Tensor) and cache.size(2) != len(ids)):
        raise ValueError(
            f"{_OP}: cache: expected contiguous [L, 2, B, H_kv, T_max, D] with B as ids, got shape"
            f" {tuple(cache.shape)}; make it with torch.empty"
        )
    if cache.size(3) < 1 or heads % cache.size(3):
        raise ValueError(f"{_OP}: heads: expected a multiple of the cache's {cache.size(3)} heads, got {heads}")
    for name, table in (("cos", cos), ("sin", sin)):
        checks.is_floating(_OP, name, table)
        if table.dim() != 2 or table.size(1) * 2 != cache.size(5):
            raise ValueError(
                f"{_OP}: {name}: expected [positions, {cache.size(5)} / 2], half of the cache's channels, got"
                f" {tuple(table.shape)}; rotary_tables makes it"
            )


def check_weights(op: str, weights: list[torch.Tensor], head_dim: int) -> layout.Sizes:
    """Their number and shapes."""
    least = len(layout.FIRST) + len(layout.LAST)
    if len(weights) < least or (len(weights) - least) % len(layout.LAYER):
        raise ValueError(
            f"{op}: weights: expected {least} tensors and {len(layout.LAYER)} for each layer, got {len(weights)};"
            f" LlamaDecoder makes the list from a state dict"
        )
    names = layout.names((len(weights) - least) // len(layout.LAYER))
    for name, w in zip(names, weights, strict=True):
        if not isinstance(w, torch.Tensor):
            raise TypeError(f"{op}: weights: {name}: expected a tensor, got {type(w).__name__}")
        if layout.is_matrix(name) and w.dim() != 2:
            raise ValueError(f"{op}: weights: {name}: expected a matrix [out, in], got shape {tuple(w.shape)}")
    size = layout.sizes_of(weights, head_dim)
    for name, w, shape in zip(names, weights, layout.shapes(size), strict=True):
        if w.shape != shape and not (name.endswith(layout.ABSENT) and w.numel() == 0):
            turned = w.dim() == 2 and tuple(reversed(w.shape)) == shape
            remedy = "transpose it: nn.Linear's are [out, in]" if turned else "weights must be of one model"
            raise ValueError(f"{op}: weights: {name}: expected shape {shape}, got {tuple(w.shape)}; {remedy}")
    return size


class LlamaDecoder(TextDecoder):
    """A Llama with its cache, ready to decode on a CPU: `prefill` the prompt, then `step` by step.

    Weights are read where they lie if they have the dtype asked for; see GPTDecoder, also on weights that change.

    Args:
        weights: by Hugging Face's names, as a state_dict has them (model.embed_tokens.weight,
            model.layers.0.input_layernorm.weight, ...). lm_head.weight may be absent (tied to embed_tokens), and so may
            any bias, and the norms of queries and keys.
        cos, sin: float32 [P, D / 2]; see `llama_decode`.
        heads: of queries.
        block: tokens that the cache has room for, at most P.
        batch: samples that are decoded side by side, all with equally many tokens.
        dtype: of the matrices: "float32"; "bfloat16", half the memory and time; "int8", a quarter, with a factor for
            each row. All else is float32, and so are sums.
        cache: of keys and values, "float32", or "bfloat16": half the memory, and less to read.
        windows: of each layer, as of `llama_decode`; None: all see all.
        softcap, eps: as of `llama_decode`.

    Attributes:
        length: tokens that the cache holds.
        block, batch, vocabulary: as above.

    Raises: TypeError, ValueError where weights do not fit; naming the key, what was expected and what came.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        cos: torch.Tensor,
        sin: torch.Tensor,
        heads: int,
        block: int,
        batch: int = 1,
        dtype: str = "float32",
        *,
        cache: str = "float32",
        windows: Sequence[int] | None = None,
        softcap: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        checks.one_of(_CLASS, "dtype", dtype, tuple(DTYPES))
        checks.one_of(_CLASS, "cache", cache, tuple(CACHES))
        heads, block, batch = positive_sizes(_CLASS, heads=heads, block=block, batch=batch)
        self._given, self._sources = _in_order(weights)
        head_dim = 2 * cos.size(-1)
        size = check_weights(_CLASS, self._given, head_dim)
        kv_heads = size.keys // head_dim if size.layers else heads
        if size.layers and (size.queries != heads * head_dim or size.keys % head_dim or heads % max(kv_heads, 1)):
            raise ValueError(
                f"{_CLASS}: heads: expected q_proj of {heads} heads of {head_dim} channels, and k_proj of a divisor of"
                f" them, got {size.queries} and {size.keys} channels"
            )
        if block > cos.size(0):
            raise ValueError(f"{_CLASS}: block: expected at most {cos.size(0)}, the rows of cos, got {block}")
        self.block, self.batch, self.vocabulary = block, batch, size.vocabulary
        self._dtype, self._cos, self._sin = DTYPES[dtype], cos.detach().contiguous(), sin.detach().contiguous()
        self._settings = (
            heads, list(windows or [0] * size.layers), checks.real(_CLASS, "softcap", softcap, "a float >= 0", 0.0),
            checks.real(_CLASS, "eps", eps, "a finite float >= 0", 0.0),
        )  # fmt: skip
        self._cache = torch.empty(size.layers, 2, batch, kv_heads, block, head_dim, dtype=CACHES[cache])
        self.refresh()

    def __repr__(self) -> str:
        layers, _, batch, kv_heads, block, head_dim = self._cache.shape
        dtype = str(self._dtype).removeprefix("torch.")
        return (
            f"{_CLASS}({layers} layers, {self._settings[0]} heads of {head_dim}, {kv_heads} of keys, vocabulary"
            f" {self.vocabulary}, {dtype}, {self.length} of {block} tokens, batch {batch})"
        )

    def _narrowed(self) -> None:
        self._weights, self._scales = layout.narrowed(self._given, self._dtype)

    def _logits(self, ids: torch.Tensor, every: bool) -> torch.Tensor:
        weights = (self._weights, self._scales, self._cos, self._sin)
        return library_call(_OP, self._cache, ids, self.length, *weights, *self._settings, every, forced_backend())


def _in_order(weights: Mapping[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The list of layout.py, and those of its tensors whose changes can be seen."""
    prefix = "model.layers."
    layers = {name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)}
    names = layout.names(len(layers))
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise ValueError(
            f"{_CLASS}: weights: expected Hugging Face's names of a Llama (model.embed_tokens.weight,"
            f" model.layers.0.input_layernorm.weight, ..., lm_head.weight), got {unknown[0]!r}; rename or leave out"
        )
    return in_order(
        _CLASS, weights, names, lambda name, before: torch.empty(0) if name.endswith(layout.ABSENT) else None
    )
