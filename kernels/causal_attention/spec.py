"""causal_attention: what the op is, its cases and its cost."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from genai_fast.kernels.causal_attention import reference
from genai_fast.kernels.causal_attention.schema import CAUSAL_LIBRARY
from genai_fast.kernels.common.spec import Case, CompileCase, Cost, ErrorCase, Expected, Limits, OpSpec, choices_of


def _reference(
    q, k, v, *, scale=None, window=None, softcap=None, causal=True, dropout=0.0, seed=None, offset=0,
    cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, return_lse=False,
):  # fmt: skip
    seed = torch.as_tensor(seed, device=q.device) if dropout else None
    out, lse = reference.causal_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, 0, 0, seed,
        q.size(3) ** -0.5 if scale is None else scale, window or 0, softcap or 0.0, causal, dropout, offset,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _sdpa(q, k, v):
    """What people write."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))


def _pinned(backend):
    """The same by one of PyTorch's kernels, and no other."""

    def sdpa(q, k, v):
        with sdpa_kernel(backend):
            return _sdpa(q, k, v)

    return sdpa


def _cost(q, k, v, *, causal=True, **more):
    # Two products forward, five backward, over half the scores. Forward reads q, k, v and writes out; backward reads
    # them and the gradient, and writes three.
    b, h, t, d = q.shape
    scores = b * h * t * k.size(2) * (0.5 if causal else 1.0)
    size = q.element_size()
    if not q.requires_grad:
        return Cost(flops=int(2 * 2 * scores * d), bytes=size * (2 * q.numel() + 2 * k.numel()))
    return Cost(flops=int(7 * 2 * scores * d), bytes=size * (6 * q.numel() + 6 * k.numel()))


def _inputs(batch, heads, queries, channels, *, keys=None, key_heads=None, scaled=1.0, **more):
    """Each of q, k, v contiguous."""

    def make(t):
        n, kv = queries if keys is None else keys, key_heads or heads
        tensors = dict(
            q=t.normal(batch, heads, queries, channels, scale=scaled),
            k=t.normal(batch, kv, n, channels, scale=scaled),
            v=t.normal(batch, kv, n, channels),
        )
        return {**tensors, **{name: x(t) if callable(x) else x for name, x in more.items()}}

    return make


def _projected(batch, heads, tokens, channels, key_heads=None):
    """Views of one projection [B, T, (H + 2 H_kv) D], as the layers of a Transformer give them."""

    def make(t):
        kv = key_heads or heads
        packed = t.normal(batch, tokens, (heads + 2 * kv) * channels, grad=False)
        parts = packed.unflatten(-1, (heads + 2 * kv, channels)).transpose(1, 2).split((heads, kv, kv), 1)
        return {name: x.detach().requires_grad_() for name, x in zip("qkv", parts, strict=True)}

    return make


def _starts(*begin):
    return lambda t: torch.tensor(begin, dtype=torch.int32, device=t.device)


def _seed(t):
    return t.seed(1234)


def _special(t):
    """NaN in one query, infinities in another."""
    q = torch.zeros(1, 1, 5, 8)
    q[0, 0, 1, 2], q[0, 0, 2, 3] = float("nan"), float("inf")
    k = torch.randn(1, 1, 5, 8, generator=t.generator).abs() + 0.1
    finish = dict(dtype=t.dtype, device=t.device)
    return dict(q=q.to(**finish).requires_grad_(), k=k.to(**finish).requires_grad_(), v=t.normal(1, 1, 5, 8))


def _large(t):
    """Scores that overflow plain exponentials. Where these leave one key, the gradients of q and k are differences of
    nearly equal numbers, which the rounding of the result drowns in narrow types (of plain eager attention even more).
    """
    return _inputs(1, 1, 70, 16, scaled=5.0 if t.dtype is torch.float32 else 2.0)(t)


_RAGGED = (0, 5, 5, 70, 71)

CASES = (
    Case("gpt", _projected(2, 2, 70, 64)),
    Case("second_order", _inputs(1, 2, 7, 8, return_lse=True)),
    Case("long_row", _inputs(1, 1, 131, 16)),
    Case("grouped_query", _projected(1, 4, 67, 32, key_heads=2)),
    Case("one_key_head", _inputs(2, 3, 33, 16, key_heads=1)),
    Case("head_dim_20", _inputs(1, 2, 66, 20)),
    Case("head_dim_1", _inputs(1, 1, 9, 1)),
    Case("head_dim_80", _inputs(1, 1, 65, 80)),
    Case("head_dim_128", _inputs(1, 1, 70, 128)),
    Case("head_dim_256", _inputs(1, 1, 35, 256)),
    Case("more_keys", _inputs(1, 2, 33, 16, keys=100)),
    Case("one_query", _inputs(2, 2, 1, 32, keys=77)),
    Case("one_element", _inputs(1, 1, 1, 8)),
    Case("not_causal", _inputs(1, 2, 70, 16, keys=45, causal=False)),
    Case("window", _inputs(1, 2, 150, 16, window=40)),
    Case("window_of_1", _inputs(1, 1, 9, 16, window=1)),
    Case("window_of_2", _inputs(1, 1, 70, 16, window=2)),
    Case("window_both_ways", _inputs(1, 1, 140, 16, window=20, causal=False)),
    Case("window_more_keys", _inputs(1, 1, 40, 16, keys=150, window=70)),
    Case("softcap", _inputs(1, 2, 67, 16, softcap=3.0, scaled=3.0)),
    Case("scale", _inputs(1, 1, 20, 16, scale=0.3)),
    Case("negative_scale", _inputs(1, 1, 20, 16, scale=-0.3)),
    Case("large_scores", _large),
    Case("dropout", _inputs(2, 2, 70, 16, dropout=0.3, seed=_seed, return_lse=True)),
    Case("dropout_odd", _inputs(1, 2, 35, 16, keys=77, key_heads=1, dropout=0.5, seed=_seed, offset=3)),
    Case("drop_all", _inputs(1, 1, 20, 16, dropout=1.0, seed=_seed)),
    Case("lse", _inputs(1, 2, 66, 16, return_lse=True)),
    Case("packed", _inputs(1, 2, 71, 16, cu_seqlens_q=_starts(*_RAGGED), max_seqlen_q=65, max_seqlen_k=65)),
    Case("packed_window_dropout", _inputs(1, 2, 71, 16, cu_seqlens_q=_starts(*_RAGGED), window=9, dropout=0.2,
                                          seed=_seed)),
    # The second sequence has no keys, the third more queries than keys: rows that see nothing.
    Case("packed_unequal", _inputs(1, 4, 71, 16, keys=50, key_heads=2, cu_seqlens_q=_starts(0, 5, 8, 70, 71),
                                   cu_seqlens_k=_starts(0, 9, 9, 40, 50), return_lse=True)),
    Case("no_keys", _inputs(1, 2, 5, 16, keys=0, causal=False, return_lse=True)),
    Case("no_queries", _inputs(1, 2, 0, 16, keys=5, return_lse=True)),
    Case("empty_batch", _inputs(0, 2, 5, 16)),
    Case("special_values", _special),
)  # fmt: skip

_GOOD = _inputs(1, 4, 6, 8, key_heads=2)


def _with(**changes):
    """The good inputs with some changed, each by a function of the good one."""
    return lambda t: (lambda good: {**good, **{n: f(good.get(n)) for n, f in changes.items()}})(_GOOD(t))


def _cut(*begin):
    return lambda _: torch.tensor(begin, dtype=torch.int32)


ERROR_CASES = (
    ErrorCase("head_dim", lambda t: _inputs(1, 1, 2, 320)(t), ValueError, r"q: .*1 to 256, got 320"),
    ErrorCase("heads", lambda t: _inputs(1, 4, 2, 8, key_heads=3)(t), ValueError, r"k: .*divides q's 4, got 3"),
    ErrorCase("dimensions", _with(q=lambda q: q[0]), ValueError, r"q: expected \[B, H, T, D\], got shape \(4, 6, 8\)"),
    ErrorCase("batch", _with(k=lambda k: k.expand(2, -1, -1, -1)), ValueError, r"k: expected batch 1 .*got .*\(2, 2"),
    ErrorCase("values", _with(v=lambda v: v[:, :, :5]), ValueError,
              r"v: expected shape \(1, 2, 6, 8\) .*got \(1, 2, 5"),
    ErrorCase("dtypes", _with(k=lambda k: k.bfloat16()), TypeError,
              r"k: expected torch\.float32 .*got torch\.bfloat16"),
    ErrorCase("integers", _with(q=lambda q: q.int()), TypeError, r"q: expected a floating-point"),
    ErrorCase("device", _with(v=lambda v: v.to("meta")), ValueError, r"v: expected device cpu .*got meta"),
    ErrorCase("last_stride", _with(k=lambda k: k.transpose(2, 3).contiguous().transpose(2, 3)), ValueError,
              r"k: expected a last dimension of stride 1, got stride 6"),
    ErrorCase("few_keys", lambda t: _inputs(1, 1, 6, 8, keys=4)(t), ValueError, r"k: expected at least 6 .*got 4"),
    ErrorCase("window", _with(window=lambda _: 0), ValueError, r"window: .*at least 1.*got 0"),
    ErrorCase("softcap", _with(softcap=lambda _: -1.0), ValueError, r"softcap: .*above 0.*got -1\.0"),
    ErrorCase("scale", _with(scale=lambda _: float("nan")), ValueError, r"scale: .*finite.*got nan"),
    ErrorCase("dropout", _with(dropout=lambda _: 1.5), ValueError, r"dropout: .*\[0, 1\].*got 1\.5"),
    ErrorCase("seed", _with(dropout=lambda _: 0.5, seed=lambda _: 1.5), TypeError, r"seed: .*got float"),
    ErrorCase("falling", _with(cu_seqlens_q=_cut(0, 4, 3, 6)), ValueError,
              r"cu_seqlens_q: .*rising.*got \[0, 4, 3, 6\]"),
    ErrorCase("last", _with(cu_seqlens_q=_cut(0, 4)), ValueError, r"cu_seqlens_q: .*length 6 last, got \[0, 4\]"),
    ErrorCase("alone", _with(cu_seqlens_k=_cut(0, 6)), TypeError, r"cu_seqlens_q: expected an int32 tensor.*NoneType"),
    ErrorCase("unequal", _with(cu_seqlens_q=_cut(0, 6), cu_seqlens_k=_cut(0, 2, 6)), ValueError,
              r"cu_seqlens_k: expected 2 beginnings .*got 3"),
    ErrorCase("batch_of_packed", lambda t: dict(_inputs(2, 1, 6, 8)(t), cu_seqlens_q=torch.tensor([0, 6])), ValueError,
              r"q: expected a batch of 1 with cu_seqlens_q, got 2"),
    ErrorCase("longest", _with(cu_seqlens_q=_cut(0, 6), max_seqlen_q=lambda _: 5), ValueError,
              r"max_seqlen_q: expected at least 6.*got 5"),
)  # fmt: skip

BENCH_CASES = (
    Case("gpt_nano-16x6x256x64", _projected(16, 6, 256, 64)),
    Case("gpt-1x6x1024x64", _projected(1, 6, 1024, 64)),
    Case("gpt2-2x12x1024x64", _projected(2, 12, 1024, 64)),
)


def _without_gradients(make):
    return lambda t: {name: x.detach() for name, x in make(t).items()}


GPU_CASES = tuple(
    Case(
        f"{b}x{h}x{n}x{d}{'' if backward else '-forward'}",
        _inputs(b, h, n, d) if backward else _without_gradients(_inputs(b, h, n, d)),
    )
    for b, h, n, d in (
        (16, 16, 1024, 64),
        (8, 16, 2048, 64),
        (2, 16, 4096, 64),
        (16, 8, 1024, 128),
        (4, 8, 4096, 128),
        (1, 2, 16384, 128),
    )
    for backward in (False, True)
)


def _masked(name, channels=64, precisions=("bf16",), heads=12, **more):
    return CompileCase(name, _inputs(2, heads, 1024, channels, **more), precisions)


def _unaligned(**more):
    """One head of 20 channels, with memory at any address."""

    def make(t):
        parts = [t.normal(1, 1, 1024, 21, grad=False)[..., 1:].requires_grad_() for _ in range(3)]
        return dict(zip("qkv", parts, strict=True)) | {name: x(t) for name, x in more.items()}

    return make


_DROPPED = dict(dropout=lambda t: 0.1, seed=_seed)
_PACKED = dict(cu_seqlens_q=_starts(0, 300, 1024))
_COMPILE_CASES = (
    _masked("d64", precisions=("fp16",)),
    _masked("d128", 128, ("fp32", "bf16")),
    _masked("d256", 256, ("fp32", "bf16")),
    CompileCase("short", _inputs(2, 12, 64, 64)),
    _masked("full", causal=False),
    _masked("window", window=256),
    _masked("softcap", softcap=20.0),
    _masked("dropout", **_DROPPED),
    _masked("dropout-d128", 128, **_DROPPED),
    CompileCase("packed_grouped", _inputs(1, 12, 1024, 64, key_heads=4, **_PACKED)),
    CompileCase("packed_dropout", _inputs(1, 12, 1024, 64, **_PACKED, **_DROPPED)),
    CompileCase("unaligned", _unaligned()),
    CompileCase("unaligned-packed_dropout", _unaligned(**_PACKED, **_DROPPED)),
)


def _wide(*tensors):
    return Expected(tuple(f"{x}_row" for x in tensors), tensor_cores=True)


_EXPECTED = {
    "_causal_attention_forward": _wide(*"qkv"),
    "_causal_attention_summary": Expected(("grad_row", "out_row")),
    "_causal_attention_grad_queries": _wide(*"qkv", "grad"),
    "_causal_attention_grad_keys": replace(
        _wide(*"qkv", "grad"), may_spill=lambda c: c["BLOCK_D"] == 256 and c["PRECISION"] == "ieee"
    ),
}

CAUSAL_ATTENTION = OpSpec(
    name="causal_attention",
    folder="causal_attention",
    formula="softmax(scale q k^T) v over the keys that each query sees",
    source="Vaswani et al. 2017; Dao et al. 2022 (FlashAttention)",
    library=CAUSAL_LIBRARY,
    reference=_reference,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    limits=Limits(_projected(1, 2, 256, 64), (61.3, 10.7, 46.6, 82), 1.05, 1.05),
    gpu_cases=GPU_CASES,
    peers={"eager": _sdpa},
    gpu_peers={
        "SDPA (flash)": _pinned(SDPBackend.FLASH_ATTENTION),
        "SDPA (cuDNN)": _pinned(SDPBackend.CUDNN_ATTENTION),
        "SDPA (efficient)": _pinned(SDPBackend.EFFICIENT_ATTENTION),
    },
    cost=_cost,
    compile_cases=_COMPILE_CASES,
    expected=_EXPECTED,
    choices={
        "causal_attention/forward": choices_of(  # no fewer queries than keys: tiles on the diagonal would be wasted
            BLOCK_M=(64, 64, 128, 128, 128, 128),
            BLOCK_N=(64, 32, 32, 64, 128, 128),
            num_warps=(4, 4, 4, 4, 8, 8),
            num_stages=(3, 4, 4, 3, 2, 3),
        ),
        "causal_attention/grad_queries": choices_of(
            BLOCK_M=(64, 64, 128, 128), BLOCK_N=(32, 64, 32, 64), num_warps=(4, 4, 8, 8), num_stages=(3, 2, 3, 3)
        ),
        "causal_attention/grad_keys": choices_of(
            BLOCK_M=(32, 32, 64, 64), BLOCK_N=(64, 128, 64, 128), num_warps=(4, 8, 4, 8), num_stages=(3, 2, 2, 2)
        ),
    },
)
