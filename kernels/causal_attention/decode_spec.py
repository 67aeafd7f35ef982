"""decode_attention: what the op is, its cases and its cost."""

import torch
import torch.nn.functional as F

from genai_fast.kernels.causal_attention import reference
from genai_fast.kernels.causal_attention.schema import DECODE_LIBRARY
from genai_fast.kernels.common.spec import Case, CompileCase, Cost, ErrorCase, Expected, Limits, OpSpec


def _reference(
    q, k_cache, v_cache, cache_seqlens, k=None, v=None, *, scale=None, window=None, softcap=None, return_lse=False
):
    scale = q.size(3) ** -0.5 if scale is None else scale
    out, lse = reference.decode_attention(q, k_cache, v_cache, cache_seqlens, k, v, scale, window or 0, softcap or 0.0)
    return (out, lse) if return_lse else out


def _eager(q, k_cache, v_cache, cache_seqlens, k, v):
    """What people write where all samples are equally long: the cache filled, and a view of what it holds."""
    first = int(cache_seqlens[0])
    end = first + k.size(2)
    k_cache[:, :, first:end], v_cache[:, :, first:end] = k, v
    gqa = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k_cache[:, :, :end], v_cache[:, :, :end], enable_gqa=gqa)


_eager.capturable = False  # it reads the length on the host


def _cost(q, k_cache, v_cache, cache_seqlens, k=None, v=None, **settings):
    held = int(cache_seqlens.sum()) * k_cache.size(1) * k_cache.size(3)
    group = q.size(1) // k_cache.size(1)
    return Cost(flops=4 * held * group * q.size(2), bytes=2 * held * q.element_size())


def _inputs(batch, heads, queries, channels, room, lengths, *, key_heads=None, new=True, tokens_first=False, **more):
    def make(t):
        kv = key_heads or heads
        shape = (batch, room, kv, channels) if tokens_first else (batch, kv, room, channels)
        caches = [t.normal(*shape, grad=False) for _ in range(2)]
        k_cache, v_cache = (x.transpose(1, 2) if tokens_first else x for x in caches)
        tensors = dict(
            q=t.normal(batch, heads, queries, channels, grad=False),
            k_cache=k_cache,
            v_cache=v_cache,
            cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device=t.device),
        )
        if new:
            for name in ("k", "v"):
                tensors[name] = t.normal(batch, kv, queries, channels, grad=False)
        return {**tensors, **more}

    return make


CASES = (
    Case("one_token", _inputs(2, 4, 1, 64, 200, (130, 63))),
    Case("grouped_query", _inputs(1, 8, 1, 32, 100, (99,), key_heads=2, return_lse=True)),
    Case("several_tokens", _inputs(2, 3, 5, 16, 80, (0, 71), return_lse=True)),
    Case("many_tokens", _inputs(1, 2, 40, 16, 150, (100,))),
    Case("tokens_first", _inputs(2, 4, 1, 20, 70, (69, 0), tokens_first=True)),
    Case("held_already", _inputs(2, 2, 2, 16, 70, (70, 1), new=False, return_lse=True)),
    Case("nothing_held", _inputs(2, 2, 1, 16, 9, (0, 5), new=False, return_lse=True)),
    Case("window", _inputs(2, 2, 3, 16, 300, (290, 10), window=70)),
    Case("softcap", _inputs(1, 2, 1, 16, 70, (66,), softcap=2.0)),
    Case("long", _inputs(1, 1, 1, 16, 1200, (1199,), scale=0.7)),
    Case("head_dim_256", _inputs(1, 1, 2, 256, 70, (66,))),
    Case("no_samples", _inputs(0, 2, 1, 16, 9, ())),
)

_GOOD = _inputs(2, 4, 1, 8, 9, (8, 3), key_heads=2)


def _with(**changes):
    return lambda t: (lambda good: {**good, **{n: f(good.get(n)) for n, f in changes.items()}})(_GOOD(t))


ERROR_CASES = (
    ErrorCase("full", _with(cache_seqlens=lambda x: x + 1), ValueError,
              r"cache_seqlens: expected 0 to 8, .*cache of 9, got 9"),
    ErrorCase("negative", _with(cache_seqlens=lambda x: x - 4), ValueError, r"cache_seqlens: expected 0 .*got -1"),
    ErrorCase("lengths_dtype", _with(cache_seqlens=lambda x: x.float()), TypeError,
              r"cache_seqlens: .*got torch\.float32"),
    ErrorCase("lengths_shape", _with(cache_seqlens=lambda x: x[:1]), ValueError,
              r"cache_seqlens: .*\(2,\), got \(1,\)"),
    ErrorCase("one_of_both", _with(v=lambda _: None), ValueError, r"v: expected k and v together, got None"),
    ErrorCase("new_tokens", _with(k=lambda x: x[:, :1]), ValueError,
              r"k: expected shape \(2, 2, 1, 8\).*got \(2, 1, 1, 8"),
    ErrorCase("heads", _with(q=lambda x: x[:, :3]), ValueError, r"k_cache: .*divides q's 3, got 2"),
    ErrorCase("dtype", _with(k_cache=lambda x: x.bfloat16()), TypeError,
              r"k_cache: expected torch\.float32.*got torch\.bf"),
    ErrorCase("device", _with(v_cache=lambda x: x.to("meta")), ValueError, r"v_cache: expected device cpu.*got meta"),
    ErrorCase("gradient", _with(q=lambda x: x.requires_grad_()), ValueError, r"q: .*no gradient.*no_grad"),
    ErrorCase("window", _with(window=lambda _: 0), ValueError, r"window: .*at least 1.*got 0"),
)  # fmt: skip


def _held(heads, channels, *, queries=1, **more):
    return _inputs(2, heads, queries, channels, 1024, (1000, 63), **more)


_COMPILE_CASES = (
    CompileCase("d64", _held(12, 64), ("fp32", "fp16")),
    CompileCase("d128", _held(12, 128)),
    CompileCase("d256", _held(12, 256), ("fp32", "bf16")),
    CompileCase("window_softcap", _held(12, 64, window=256, softcap=20.0)),
    *(CompileCase(f"many_rows-d{d}", _held(16, d, queries=5, key_heads=1)) for d in (64, 128, 256)),
)
_EXPECTED = {"_decode_split": Expected((), tensor_cores=True)}

BENCH_CASES = (
    Case("gpt_nano-1x6x1x64-256", _inputs(1, 6, 1, 64, 256, (255,))),
    Case("gpt2-1x12x1x64-1024", _inputs(1, 12, 1, 64, 1024, (1000,))),
    Case("gpt2-16x12x1x64-1024", _inputs(16, 12, 1, 64, 1024, (1000,) * 16)),
)

DECODE_ATTENTION = OpSpec(
    name="decode_attention",
    folder="causal_attention",
    formula="appends k and v to a cache, then attends over all that it holds",
    source="Dao et al. 2023 (Flash-Decoding)",
    library=DECODE_LIBRARY,
    reference=_reference,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    limits=Limits(BENCH_CASES[1].inputs, (0.0373, 14.4, 0.415), 1.25, 4.35),
    peers={"eager": _eager},
    cost=_cost,
    double_backward=False,
    mutates=("k_cache", "v_cache"),
    compile_cases=_COMPILE_CASES,
    expected=_EXPECTED,
)
