"""llama_decode: what the op is, its cases and its cost."""

import math

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.spec import Case, Cost, ErrorCase, OpSpec
from genai_fast.kernels.llama_decode import reference
from genai_fast.kernels.llama_decode.layout import (
    ABSENT,
    FIRST,
    LAYER,
    Sizes,
    is_matrix,
    layers_of,
    matrices,
    names,
    narrowed,
    shapes,
)
from genai_fast.kernels.llama_decode.schema import LIBRARY


def _reference(ids, cache, length, weights, cos, sin, *, heads, windows, scales=(), softcap=0.0, eps=1e-5, every=False):
    return reference.llama_decode(cache, ids, length, weights, scales, cos, sin, heads, windows, softcap, eps, every)


def _eager(ids, cache, length, weights, cos, sin, *, heads, windows, scales=(), softcap=0.0, eps=1e-5, every=False):
    """The loop that people write around a cache of fixed size; no windows and caps."""
    end, head_dim, tokens = length + ids.size(1), cache.size(5), ids.size(1)
    cos, sin = cos[length:end], sin[length:end]
    x = F.embedding(ids, weights[0])

    def linear(x, weight, bias):
        return F.linear(x, weight, bias if bias.numel() else None)

    def norm(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, eps) if weight.numel() else x

    def turned(x):
        a, b = x.transpose(1, 2).chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    for layer in range(cache.size(0)):
        first = len(FIRST) + layer * len(LAYER)
        of_layer = weights[first : first + len(LAYER)]
        norm_1, q, q_bias, k, k_bias, v, v_bias, q_norm, k_norm, o, o_bias, norm_2, *mlp = of_layer
        y = norm(x, norm_1)
        q, k, v = (linear(y, *pair).unflatten(2, (-1, head_dim)) for pair in ((q, q_bias), (k, k_bias), (v, v_bias)))
        keys, values = cache[layer, 0], cache[layer, 1]
        keys[:, :, length:end], values[:, :, length:end] = turned(norm(k, k_norm)), v.transpose(1, 2)
        h = F.scaled_dot_product_attention(
            turned(norm(q, q_norm)), keys[:, :, :end], values[:, :, :end], is_causal=tokens > 1, enable_gqa=True
        )
        x = x + linear(h.transpose(1, 2).flatten(2), o, o_bias)
        y = norm(x, norm_2)
        x = x + linear(F.silu(linear(y, *mlp[:2])) * linear(y, *mlp[2:4]), *mlp[4:])
    return F.linear(norm(x if every else x[:, -1], weights[-2]), weights[-1])


def _prepare(inputs):
    """One dtype for all: PyTorch has no products with int8 weights and float32 factors."""
    weights, scales = list(inputs["weights"]), inputs.get("scales", ())
    for k, scale in zip(matrices(layers_of(weights)), scales, strict=False):
        weights[k] = weights[k].float() * scale[:, None]
    dtype = weights[0].dtype
    tables = {name: inputs[name].to(dtype) for name in ("cos", "sin", "cache")}
    return {**inputs, **tables, "weights": [w.to(dtype) for w in weights], "scales": ()}


_eager.prepare = _prepare


def _cost(ids, cache, length, weights, cos, sin, *, heads, **settings):
    """Each matrix is read once, and so is what the cache holds; of the embedding only some rows."""
    layers = layers_of(weights)
    (batch, tokens), read = ids.shape, [weights[k] for k in matrices(layers)[1:]]
    products = 2 * batch * (tokens * sum(w.numel() for w in read[:-1]) + read[-1].numel())
    attended = sum(range(length + 1, length + tokens + 1)) * batch * layers * heads * cache.size(5)
    held = 2 * layers * batch * (length + tokens) * cache.size(3) * cache.size(5)
    return Cost(flops=products + 4 * attended, bytes=sum(w.nbytes for w in read) + held * cache.element_size())


_DRAWN = 1 << 18  # larger tensors repeat their numbers
_ALL = ABSENT


def _inputs(
    layers, heads, kv_heads, head_dim, vocabulary, length, *, batch=1, tokens=1, room=None, width=None, hidden=None,
    dtype=None, cache=None, tied=True, absent=_ALL, windows=None, softcap=0.0, scale=1.0,
):  # fmt: skip
    """`dtype`: of the matrices, that of the tensors by default; `absent`: endings of tensors that the model lacks."""

    def make(t):
        channels, wide = width or heads * head_dim, torch.float64 if t.dtype is torch.float64 else torch.float32
        size = Sizes(
            vocabulary, channels, heads * head_dim, kv_heads * head_dim, head_dim, hidden or 3 * channels, layers
        )

        def draw(name, shape):
            if name.endswith(absent):
                return torch.empty(0, dtype=t.dtype, device=t.device)
            count = math.prod(shape)
            x = t.normal(min(count, _DRAWN), grad=False)
            x = x.repeat(-(-count // _DRAWN))[:count].view(shape) if count > _DRAWN else x.view(shape)
            if is_matrix(name):
                return x.mul_(scale * shape[1] ** -0.5)
            return x.mul_(0.2).add_(1.0 if "norm.weight" in name else 0.0)

        weights = [draw(name, shape) for name, shape in zip(names(layers), shapes(size), strict=True)]
        if tied:
            weights[-1] = weights[0]
        weights, scales = narrowed(weights, dtype or t.dtype, wide)
        place = room or length + tokens
        held = t.normal(layers, 2, batch, kv_heads, place, head_dim, grad=False)
        angles = torch.outer(torch.arange(place + 2.0), 0.3 ** torch.arange(head_dim // 2))
        ids = torch.randint(vocabulary, (batch, tokens), generator=t.generator).to(t.device)
        return dict(
            ids=ids, cache=held.to(wide if cache is None or wide is torch.float64 else cache), length=length,
            weights=weights, scales=scales, cos=angles.cos().to(t.device, wide), sin=angles.sin().to(t.device, wide),
            heads=heads, windows=list(windows or [0] * layers), softcap=softcap,
        )  # fmt: skip

    return make


_NOTHING = ("no such name",)


def _every(make):
    """With the logits of all tokens."""
    return lambda t: {**make(t), "every": True}


CASES = (
    Case("one_token", _inputs(2, 4, 2, 16, 65, 9, room=20)),
    Case("odd", _inputs(3, 3, 1, 10, 71, 33, width=19, hidden=50, tied=False)),
    Case("tiny", _inputs(1, 1, 1, 2, 2, 0, hidden=1)),
    Case("no_layers", _inputs(0, 1, 1, 8, 11, 0)),
    Case("everything", _inputs(2, 4, 2, 6, 40, 7, tokens=3, batch=2, absent=_NOTHING, windows=[0, 4], softcap=3.0)),
    Case("qkv_biases", _inputs(2, 2, 2, 8, 33, 5, absent=("o_proj.bias", "gate_proj.bias", "up_proj.bias",
                                                         "down_proj.bias", "q_norm.weight", "k_norm.weight"))),
    Case("prompt_in_parts", _inputs(1, 2, 1, 16, 50, 5, tokens=100, batch=2, windows=[30])),
    Case("many_samples", _inputs(1, 2, 1, 8, 20, 3, batch=70, tokens=2)),
    Case("wide", _inputs(1, 4, 2, 64, 300, 70)),
    Case("bfloat16", _inputs(2, 3, 1, 20, 65, 9, dtype=torch.bfloat16, batch=3)),
    Case("int8", _inputs(2, 4, 2, 20, 65, 9, dtype=torch.int8, tokens=4, absent=_NOTHING)),
    Case("int8_not_tied", _inputs(1, 3, 3, 26, 65, 9, dtype=torch.int8, tied=False)),
    Case("sharp", _inputs(2, 2, 1, 32, 40, 50, scale=6.0)),
    Case("every_token", _every(_inputs(2, 4, 2, 8, 50, 3, tokens=70, batch=2))),
    Case("no_samples", _inputs(1, 2, 1, 8, 20, 3, batch=0)),
)  # fmt: skip

_GOOD = _inputs(1, 2, 1, 4, 10, 3)
_INT8 = _inputs(1, 2, 1, 4, 10, 3, dtype=torch.int8)


def _with(good=_GOOD, **changes):
    return lambda t: (lambda found: {**found, **{n: f(found[n]) for n, f in changes.items()}})(good(t))


def _changed(k, change):
    """The list of weights with one of them changed."""
    return lambda weights: [change(w) if i == k % len(weights) else w for i, w in enumerate(weights)]


ERROR_CASES = (
    ErrorCase("full", _with(length=lambda n: n + 1), ValueError, r"ids: expected at most 0 new .*holds 4 of 4, got 1"),
    ErrorCase("length", _with(length=lambda n: -1), ValueError, r"length: expected an int >= 0.*got -1"),
    ErrorCase("id_too_large", _with(ids=lambda x: x * 0 + 10), ValueError, r"ids: expected 0 to 9, got 10"),
    ErrorCase("ids_dtype", _with(ids=lambda x: x.int()), TypeError, r"ids: expected an int64.*got torch\.int32"),
    ErrorCase("few", _with(weights=lambda w: w[:-1]), ValueError, r"weights: expected 3 tensors and 18.*got 20"),
    ErrorCase("turned", _with(weights=_changed(17, lambda w: w.t())), ValueError,
              r"down_proj\.weight: expected shape \(8, 24\), got \(24, 8\); transpose it"),
    ErrorCase("shape", _with(weights=_changed(-1, lambda w: w[:-1])), ValueError,
              r"lm_head\.weight: expected shape \(10, 8\), got \(9, 8\)"),
    ErrorCase("dimensions", _with(weights=_changed(2, lambda w: w[None])), ValueError,
              r"q_proj\.weight: expected a matrix \[out, in\]"),
    ErrorCase("mixed", _with(weights=_changed(10, lambda w: w.bfloat16())), ValueError,
              r"expected contiguous torch\.float32 \(8, 8\), got torch\.bfloat16"),
    ErrorCase("gradient", _with(weights=_changed(10, lambda w: w.requires_grad_())), ValueError, r"no_grad"),
    ErrorCase("no_scales", _with(_INT8, scales=lambda s: []), ValueError, r"a scale for each of 9 int8.*got 0"),
    ErrorCase("cache_dtype", _with(cache=lambda x: x.half()), TypeError, r"cache: expected float32.*float16"),
    ErrorCase("heads", _with(_inputs(1, 4, 2, 4, 10, 3), heads=lambda n: 3), ValueError,
              r"heads: expected a multiple of the cache's 2 heads, got 3"),
    ErrorCase("windows", _with(windows=lambda w: []), ValueError, r"a window for each layer"),
    ErrorCase("tables", _with(cos=lambda x: x[:, :1]), ValueError, r"cos: expected \[positions, 4 / 2\]"),
)  # fmt: skip

BENCH_CASES = (
    Case("llama-6x384-512", _inputs(6, 6, 2, 64, 512, 200, hidden=1024)),
    Case("llama-12x768-32000", _inputs(12, 12, 4, 64, 32000, 200, hidden=2048)),
    Case("llama-12x768-32000-bfloat16", _inputs(12, 12, 4, 64, 32000, 200, hidden=2048, dtype=torch.bfloat16)),
    Case("llama-12x768-32000-int8", _inputs(12, 12, 4, 64, 32000, 200, hidden=2048, dtype=torch.int8)),
    Case("llama-6x384-512-prompt", _inputs(6, 6, 2, 64, 512, 0, hidden=1024, tokens=128)),
)

LLAMA_DECODE = OpSpec(
    name="llama_decode",
    folder="llama_decode",
    formula="new tokens through all layers of a Llama with a cache of keys and values, in one call",
    source="Touvron et al. 2023, arXiv:2302.13971; grouped queries: Ainslie et al. 2023",
    library=LIBRARY,
    reference=_reference,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    peers={"eager": _eager},
    compiled=False,
    cost=_cost,
    backends=("reference", "cpu"),
    double_backward=False,
    mutates=("cache",),
)
