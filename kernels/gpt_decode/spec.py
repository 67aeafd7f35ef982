"""gpt_decode: what the op is, its cases and its cost."""

import math

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.spec import Case, Cost, ErrorCase, OpSpec
from genai_fast.kernels.gpt_decode import reference
from genai_fast.kernels.gpt_decode.layout import (
    FIRST,
    LAYER,
    Sizes,
    is_matrix,
    matrices,
    names,
    narrowed,
    shapes,
    sizes_of,
)
from genai_fast.kernels.gpt_decode.schema import LIBRARY


def _reference(ids, cache, length, weights, scales=(), *, eps=1e-5, every=False):
    return reference.gpt_decode(cache, ids, length, weights, scales, eps, every)


def _eager(ids, cache, length, weights, scales=(), *, eps=1e-5, every=False):
    """The loop that people write around a cache of fixed size; a model in bfloat16 where the matrices are."""
    (batch, tokens), heads, channels = ids.shape, cache.size(3), weights[0].size(1)
    end = length + tokens
    x = F.embedding(ids, weights[0]) + weights[1][length:end]
    for layer in range(cache.size(0)):
        first = len(FIRST) + layer * len(LAYER)
        ln_1, ln_1_bias, qkv, qkv_bias, proj, proj_bias, ln_2, ln_2_bias, fc, fc_bias, out, out_bias = weights[
            first : first + len(LAYER)
        ]
        h = F.linear(F.layer_norm(x, (channels,), ln_1, ln_1_bias, eps), qkv, qkv_bias)
        q, k, v = h.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        keys, values = cache[layer, 0], cache[layer, 1]
        keys[:, :, length:end], values[:, :, length:end] = k, v
        h = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], is_causal=tokens > 1)
        x = x + F.linear(h.transpose(1, 2).reshape(batch, tokens, channels), proj, proj_bias)
        h = F.gelu(F.linear(F.layer_norm(x, (channels,), ln_2, ln_2_bias, eps), fc, fc_bias), approximate="tanh")
        x = x + F.linear(h, out, out_bias)
    return F.linear(F.layer_norm(x if every else x[:, -1], (channels,), *weights[-3:-1], eps), weights[-1])


def _prepare(inputs):
    """One dtype for all: PyTorch has no products with int8 weights and float32 factors."""
    weights, scales = list(inputs["weights"]), inputs.get("scales", ())
    for k, scale in zip(matrices(sizes_of(weights).layers), scales, strict=False):
        weights[k] = weights[k].float() * scale[:, None]
    dtype = weights[0].dtype
    return {**inputs, "weights": [w.to(dtype) for w in weights], "cache": inputs["cache"].to(dtype), "scales": ()}


_eager.prepare = _prepare


def _cost(ids, cache, length, weights, scales=(), **settings):
    """Each matrix is read once, and so is what the cache holds; of the embedding only some rows."""
    size = sizes_of(weights)
    (batch, tokens), read = ids.shape, [weights[k] for k in matrices(size.layers)[1:]]
    products = 2 * batch * (tokens * sum(w.numel() for w in read[:-1]) + read[-1].numel())
    attended = sum(range(length + 1, length + tokens + 1)) * batch * size.layers * size.channels
    held = 2 * size.layers * batch * (length + tokens) * size.channels
    return Cost(flops=products + 4 * attended, bytes=sum(w.nbytes for w in read) + held * cache.element_size())


_DRAWN = 1 << 18  # larger tensors repeat their numbers


def _inputs(
    layers, heads, head_dim, vocabulary, length, *, batch=1, tokens=1, room=None, hidden=None, dtype=None, tied=True,
    scale=1.0,
):  # fmt: skip
    """`dtype`: of the matrices, that of the tensors by default."""

    def make(t):
        channels, wide = heads * head_dim, torch.float64 if t.dtype is torch.float64 else torch.float32
        size = Sizes(vocabulary, channels, length + tokens + 3, layers, 4 * channels if hidden is None else hidden)

        def draw(name, shape):
            count = math.prod(shape)
            x = t.normal(min(count, _DRAWN), grad=False)
            x = x.repeat(-(-count // _DRAWN))[:count].view(shape) if count > _DRAWN else x.view(shape)
            if is_matrix(name):
                return x.mul_(scale * shape[1] ** -0.5)
            return x.mul_(0.2).add_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)

        weights = [draw(name, shape) for name, shape in zip(names(layers), shapes(size), strict=True)]
        if tied:
            weights[-1] = weights[0]
        weights, scales = narrowed(weights, dtype or t.dtype, wide)
        cache = t.normal(layers, 2, batch, heads, room or length + tokens, head_dim, grad=False)
        ids = torch.randint(vocabulary, (batch, tokens), generator=t.generator).to(t.device)
        return dict(ids=ids, cache=cache.to(wide), length=length, weights=weights, scales=scales)

    return make


def _every(make):
    """With the logits of all tokens."""
    return lambda t: {**make(t), "every": True}


CASES = (
    Case("one_token", _inputs(2, 3, 16, 65, 9, room=20)),
    Case("odd", _inputs(3, 2, 19, 71, 33, hidden=50, tied=False)),
    Case("tiny", _inputs(1, 1, 1, 2, 0, hidden=1)),
    Case("no_layers", _inputs(0, 1, 8, 11, 0)),
    Case("first_token", _inputs(2, 2, 32, 40, 0, room=7)),
    Case("prompt", _inputs(2, 2, 24, 50, 0, tokens=13, room=16)),
    Case("prompt_in_parts", _inputs(1, 2, 16, 50, 5, tokens=100, batch=2)),
    Case("batch", _inputs(2, 4, 8, 33, 17, batch=9)),
    Case("many_samples", _inputs(1, 2, 8, 20, 3, batch=70, tokens=2)),
    Case("wide", _inputs(1, 4, 64, 300, 70)),
    Case("bfloat16", _inputs(2, 3, 20, 65, 9, dtype=torch.bfloat16, batch=3)),
    Case("int8", _inputs(2, 3, 20, 65, 9, dtype=torch.int8, tokens=4)),
    Case("int8_not_tied", _inputs(1, 3, 25, 65, 9, dtype=torch.int8, tied=False)),
    Case("sharp", _inputs(2, 2, 32, 40, 50, scale=6.0)),
    Case("every_token", _every(_inputs(2, 2, 24, 50, 3, tokens=70, batch=2))),
    Case("no_samples", _inputs(1, 2, 8, 20, 3, batch=0)),
)

_GOOD = _inputs(1, 2, 4, 10, 3)
_INT8 = _inputs(1, 2, 4, 10, 3, dtype=torch.int8)


def _with(good=_GOOD, **changes):
    return lambda t: (lambda found: {**found, **{n: f(found[n]) for n, f in changes.items()}})(good(t))


def _changed(k, change):
    """The list of weights with one of them changed."""
    return lambda weights: [change(w) if i == k % len(weights) else w for i, w in enumerate(weights)]


ERROR_CASES = (
    ErrorCase("full", _with(length=lambda n: n + 1), ValueError, r"ids: expected at most 0 new .*holds 4 of 4, got 1"),
    ErrorCase("length", _with(length=lambda n: -1), ValueError, r"length: expected an int >= 0.*got -1"),
    ErrorCase("id_too_large", _with(ids=lambda x: x * 0 + 10), ValueError, r"ids: expected 0 to 9, got 10"),
    ErrorCase("id_negative", _with(ids=lambda x: x * 0 - 1), ValueError, r"ids: expected 0 to 9, got -1"),
    ErrorCase("ids_dtype", _with(ids=lambda x: x.int()), TypeError, r"ids: expected an int64.*got torch\.int32"),
    ErrorCase("ids_shape", _with(ids=lambda x: x[0]), ValueError, r"ids: expected \[B, T\].*got shape \(1,\)"),
    ErrorCase("no_tokens", _with(ids=lambda x: x[:, :0]), ValueError, r"ids: .*at least 1 token.*got shape \(1, 0\)"),
    ErrorCase("ids_device", _with(ids=lambda x: x.to("meta")), ValueError, r"ids: expected device cpu.*got meta"),
    ErrorCase("few", _with(weights=lambda w: w[:-1]), ValueError, r"weights: expected 5 tensors and 12.*got 16"),
    ErrorCase("turned", _with(weights=_changed(4, lambda w: w.t())), ValueError,
              r"h\.0\.attn\.c_attn\.weight: expected shape \(24, 8\), got \(8, 24\); transpose it"),
    ErrorCase("shape", _with(weights=_changed(-1, lambda w: w[:-1])), ValueError,
              r"lm_head\.weight: expected shape \(10, 8\), got \(9, 8\)"),
    ErrorCase("dimensions", _with(weights=_changed(2, lambda w: w[None])), ValueError,
              r"ln_1\.weight: expected a vector, got shape \(1, 8\)"),
    ErrorCase("mixed", _with(weights=_changed(6, lambda w: w.bfloat16())), TypeError,
              r"attn\.c_proj\.weight: expected torch\.float32, got torch\.bfloat16"),
    ErrorCase("narrow_bias", _with(weights=_changed(7, lambda w: w.half())), TypeError,
              r"attn\.c_proj\.bias: expected torch\.float32, got torch\.float16"),
    ErrorCase("strides", _with(weights=_changed(6, lambda w: w.t())), ValueError, r"c_proj\.weight: .*contiguous"),
    ErrorCase("gradient", _with(weights=_changed(6, lambda w: w.requires_grad_())), ValueError,
              r"c_proj\.weight: .*no gradient.*no_grad"),
    ErrorCase("weight_device", _with(weights=_changed(6, lambda w: w.to("meta"))), ValueError,
              r"c_proj\.weight: expected device cpu.*got meta"),
    ErrorCase("no_scales", _with(_INT8, scales=lambda s: []), ValueError, r"scales: expected 6 tensors.*got 0"),
    ErrorCase("scale", _with(_INT8, scales=lambda s: [s[0][:-1], *s[1:]]), ValueError,
              r"scales: .*\(10,\).*got torch\.float32 \(9,\)"),
    ErrorCase("needless_scales", _with(scales=lambda s: [torch.ones(10)]), ValueError, r"scales: expected 0.*got 1"),
    ErrorCase("cache_dtype", _with(cache=lambda x: x.half()), TypeError, r"cache: expected torch\.float32.*float16"),
    ErrorCase("cache_batch", _with(cache=lambda x: x.expand(-1, -1, 2, -1, -1, -1).contiguous()), ValueError,
              r"cache: expected contiguous \[1, 2, 1, H, T_max, D\]"),
    ErrorCase("cache_heads", _with(cache=lambda x: x[:, :, :, :1].contiguous()), ValueError,
              r"cache: expected heads times head_dim to be 8.*got 1 x 4"),
)  # fmt: skip

BENCH_CASES = (
    Case("gpt_nano-6x384-512", _inputs(6, 6, 64, 512, 200)),
    Case("gpt_nano-6x384-50257", _inputs(6, 6, 64, 50257, 200)),
    Case("gpt_nano-6x384-512-bfloat16", _inputs(6, 6, 64, 512, 200, dtype=torch.bfloat16)),
    Case("gpt2-12x768-50257", _inputs(12, 12, 64, 50257, 200)),
    Case("gpt2-12x768-50257-bfloat16", _inputs(12, 12, 64, 50257, 200, dtype=torch.bfloat16)),
    Case("gpt2-12x768-50257-int8", _inputs(12, 12, 64, 50257, 200, dtype=torch.int8)),
    Case("gpt_nano-6x384-512-prompt", _inputs(6, 6, 64, 512, 0, tokens=128)),
)

GPT_DECODE = OpSpec(
    name="gpt_decode",
    folder="gpt_decode",
    formula="new tokens through all layers of a GPT-2 with a cache of keys and values, in one call",
    source="Radford et al. 2019 (GPT-2)",
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
