"""causal_attention on the GPU: the softmax runs along the keys tile by tile, so no matrix of scores is ever stored.

Scores are in units of ln 2: exp2 is one instruction. A negative scale is one of -q.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.causal_attention.backward_triton import (
    _causal_attention_grad_keys,
    _causal_attention_grad_queries,
    _causal_attention_summary,
)
from genai_fast.kernels.causal_attention.decode_triton import decode
from genai_fast.kernels.causal_attention.layout import (
    alike,
    empty_alike,
    heads_inside,
    require_heads,
    require_lengths,
    require_rows,
)
from genai_fast.kernels.causal_attention.tiles import forward_tile, keys_tile, padded, queries_tile, summary_rows
from genai_fast.kernels.causal_attention.tiles_triton import (
    dense_at,
    head_at,
    kept,
    rows_of,
    seen,
    sequence_of,
    span,
    store_rows,
    wide,
)
from genai_fast.kernels.common.activations_triton import tanh
from genai_fast.kernels.common.dot_triton import dot
from genai_fast.kernels.common.extension import interpreting
from genai_fast.kernels.common.launch import capability, ceil_div, compiled
from genai_fast.kernels.common.philox import scale as grown
from genai_fast.kernels.common.philox import threshold
from genai_fast.kernels.common.recorder import reads
from genai_fast.kernels.common.tuned import launch

LOG2_E = 1.4426950408889634
MOST_STRIDE = 2**23  # between rows: offsets within a tile, of at most 256 rows, have 32 bits


@triton.jit
def _step(
    acc, most, total, q, k_ptr, v_ptr,       # [M, BLOCK_D], [M], [M], [M, BLOCK_D]; keys of the head
    key, keys, k_row, v_row, position, window, scale, cap,
    seed, drop_row, offset, pitch, column, bound,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The sums over one more tile of keys; MASK: some of them do not exist or are hidden from some queries."""
    k = rows_of(k_ptr, key, k_row, keys, D, BLOCK_D, BLOCK_N, MASK)
    score = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, UPCAST)
    # Elsewhere the scale and the subtraction of the maximum are one multiply-add.
    SCALED: tl.constexpr = CAPPED or MASK
    if CAPPED:
        score = tanh(score * scale) * cap
    elif MASK:
        score *= scale
    if MASK:
        visible = seen(position[:, None], key + tl.arange(0, BLOCK_N)[None, :], keys, window, CAUSAL, WINDOWED)
        score = tl.where(visible, score, float("-inf"))
    largest = tl.max(score, axis=1)
    if not SCALED:
        largest *= scale
    largest = tl.maximum(most, largest)
    shift = tl.where(largest == float("-inf"), 0.0, largest)  # of a row that has seen nothing yet
    if SCALED:  # noqa: SIM108
        p = tl.exp2(score - shift[:, None])
    else:
        p = tl.exp2(score * scale - shift[:, None])
    shrunk = tl.exp2(most - shift)
    total = total * shrunk + tl.sum(p, axis=1)
    acc *= shrunk[:, None]
    if seed is not None:
        keep = kept(seed, drop_row, offset, pitch, column + key, bound, ALIGNED, BLOCK_N)
        p = tl.where(keep, p, 0.0)
    v = rows_of(v_ptr, key, v_row, keys, D, BLOCK_D, BLOCK_N, MASK)
    acc = dot(p, v, acc, PRECISION, UPCAST)
    return acc, largest, total


@triton.jit(do_not_specialize=["queries", "keys", "tiles", "window", "offset", "bound"])
def _causal_attention_forward(
    q_ptr, k_ptr, v_ptr,                     # [B, H, queries, D], [B, H / group, keys, D] twice
    out_ptr, lse_ptr,                        # [B, H, queries, D], [B, H, queries]
    starts_q_ptr, starts_k_ptr,              # [N + 1], or None: one sequence a sample
    seed_ptr,                                # int64 scalar, or None: no dropout
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, group, queries, keys, tiles, scale, cap, window, offset, bound, grown, INSIDE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T) v and its lse: BLOCK_M queries of one head a program, those with the most keys first.

    scale: of scores in units of ln 2; if CAPPED before the cap, which then holds those units.
    """
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    head = tl.program_id(0) // tiles % heads
    index = tl.program_id(0) // tiles // heads
    begin_q, count_q = sequence_of(starts_q_ptr, index, queries)
    begin_k, count_k = sequence_of(starts_k_ptr, index, keys)
    sample = index
    if starts_q_ptr is not None:
        sample = 0
        if first >= count_q:
            return
    q_ptr = head_at(q_ptr, sample, head, begin_q, q_batch, q_head, q_row)
    k_ptr = head_at(k_ptr, sample, head // group, begin_k, k_batch, k_head, k_row)
    v_ptr = head_at(v_ptr, sample, head // group, begin_k, v_batch, v_head, v_row)
    row = (wide(sample) * heads + head) * queries + begin_q  # of lse and dropout
    q = rows_of(q_ptr, first, q_row, count_q, D, BLOCK_D, BLOCK_M, True)
    offs = first + tl.arange(0, BLOCK_M)
    shift = count_k - count_q
    seed = seed_ptr
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    pitch = (keys + 3) // 4 * 4
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    above = window - 1
    if CAUSAL:
        above = 0
    start, whole, rest, end = span(
        first + shift, first + shift + (BLOCK_M - 1), window - 1, above, count_k, WINDOWED, CAUSAL or WINDOWED, BLOCK_N
    )
    for part in tl.static_range(0 if WINDOWED else 1, 3):  # before, among and behind the keys that all queries see
        if part == 0:
            low, high = start, tl.minimum(whole, end)
        elif part == 1:
            low, high = whole, rest
        else:
            low, high = rest, end
        for key in range(low, high, BLOCK_N):
            acc, most, total = _step(
                acc, most, total, q, k_ptr, v_ptr, key, count_k, k_row, v_row, offs + shift, window, scale, cap,
                seed, row + offs, offset, pitch, begin_k, bound,
                part != 1, CAUSAL, WINDOWED, CAPPED, ALIGNED, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, UPCAST,
            )  # fmt: skip
    lse = (most + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + row + offs, lse, mask=offs < count_q)
    acc *= (grown / tl.where(total == 0.0, 1.0, total))[:, None]
    out_at, stride = dense_at(out_ptr, sample, head, begin_q, heads, queries, D, INSIDE)
    store_rows(out_at, acc, first, stride, count_q, D, BLOCK_D, BLOCK_M)


def _multiplier(x):
    """How tl.dot multiplies: float32 in TF32 only where torch lets its own matrix products do so."""
    tf32 = compiled(x) and reads(lambda: torch.backends.cuda.matmul.fp32_precision) == "tf32"
    return dict(PRECISION="tf32" if tf32 else "ieee", UPCAST=interpreting() and x.dtype is torch.bfloat16)


def _rows(x):
    """(x, its strides of batch, head and row); copies only what lies too far apart."""
    if x.stride(2) >= MOST_STRIDE:
        x = x.contiguous()
    return x, x.stride()[:3]


def _settings(q, keys, starts_q, seed, scale, window, softcap, causal, share, offset):
    """The seed or None, what the kernels take by value, and their constants."""
    if window >= max(q.size(2), keys):  # hides nothing
        window = 0
    limit = threshold(share) if seed is not None else 0  # a share that rounds to no word drops nothing
    if not limit:
        seed, offset, limit, share = None, 0, 1, 0.0
    bound = limit - 1 if limit <= 2**31 else limit - 1 - 2**32  # the largest word dropped, as 32 bits
    scale, cap = (scale / softcap, softcap * LOG2_E) if softcap else (scale * LOG2_E, 0.0)
    channels = q.size(3)
    constants = dict(
        CAUSAL=causal, WINDOWED=window > 0, CAPPED=softcap > 0, ALIGNED=starts_q is None, D=channels,
        BLOCK_D=padded(channels), **_multiplier(q),
    )  # fmt: skip
    return seed, (scale, cap, window, offset, bound, grown(share)), constants


def _sizes(q, k, starts_q, most_q, most_k):
    """Sequences, and the longest of each kind."""
    if starts_q is None:
        return q.size(0), q.size(2), k.size(2)
    return starts_q.numel() - 1, min(most_q, q.size(2)), min(most_k, k.size(2))


def _extra(seed, starts_q, softcap):
    """What else there is to compute: Philox calls for four scores, or as much for a cap."""
    return (1 if starts_q is None else 2) if seed is not None else int(softcap > 0)


def _launch(name, q, k, extra, tile):
    """What needs more registers, or no matrix instructions, is tuned apart; of wide heads nothing else fits.

    Packed sequences count as one: a CUDA graph's capture does not know the longest, and must take the same tile.
    """
    kind = "_wide" if padded(q.size(3)) > 128 else "_float32" if q.element_size() == 4 else "_extra" if extra else ""
    return launch(f"causal_attention/{name}{kind}", q, (q.size(2), k.size(2), q.size(3)), **tile)


def causal_attention(q, k, v, starts_q, starts_k, most_q, most_k, seed, scale, window, softcap, causal, share, offset):
    q, k, v, starts_q, starts_k = require_heads(q, k, v, starts_q, starts_k, seed)
    out, inside = empty_alike(q), heads_inside(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not q.numel():
        return out, lse
    if scale < 0.0:
        q, scale = -q, -scale
    (q, q_strides), (k, k_strides), (v, v_strides) = map(_rows, (q, k, v))
    seed, values, constants = _settings(q, k.size(2), starts_q, seed, scale, window, softcap, causal, share, offset)
    heads, sizes = q.size(1), (q.size(2), k.size(2))
    sequences, most_q, most_k = _sizes(q, k, starts_q, most_q, most_k)
    extra = _extra(seed, starts_q, softcap)
    tile = forward_tile(q.element_size(), q.size(3), q.size(2), extra, capability(q.device))
    tile = _launch("forward", q, k, extra, tile)
    tiles = ceil_div(most_q, tile["BLOCK_M"])
    _causal_attention_forward[(tiles * heads * sequences,)](
        q, k, v, out, lse, starts_q, starts_k, seed, *q_strides, *k_strides, *v_strides,
        heads, heads // k.size(1), *sizes, tiles, *values, INSIDE=inside, **constants, **tile,
    )  # fmt: skip
    return out, lse


def causal_attention_backward(
    grad_out, grad_lse, q, k, v, out, lse, starts_q, starts_k, most_q, most_k, seed, scale, window, softcap, causal,
    share, offset,
):  # fmt: skip
    q, k, v, starts_q, starts_k = require_heads(q, k, v, starts_q, starts_k, seed)
    grad_out, out, lse, grad_lse = require_rows(q, grad_out, out, lse, grad_lse)
    gradients, inside = [empty_alike(x) for x in (q, k, v)], heads_inside(q)
    if not q.numel():
        for x in gradients:
            x.zero_()
        return tuple(gradients)
    negative, scale = scale < 0.0, abs(scale)
    if negative:
        q = -q
    tensors, strides = zip(*map(_rows, (q, k, v, grad_out)), strict=True)
    out, out_strides = _rows(out)
    seed, values, constants = _settings(q, k.size(2), starts_q, seed, scale, window, softcap, causal, share, offset)
    heads, key_heads, channels = q.size(1), k.size(1), q.size(3)
    power, delta = torch.empty_like(lse), torch.empty_like(lse)
    rows = summary_rows(channels)
    tiles = ceil_div(q.size(2), rows)
    _causal_attention_summary[(tiles * heads * q.size(0),)](
        tensors[3], out, lse, grad_lse, power, delta, *strides[3], *out_strides, heads, q.size(2), tiles,
        D=channels, BLOCK_D=constants["BLOCK_D"], BLOCK_M=rows, num_warps=4,
        enable_fp_fusion=False,  # else threads that exchange one product each end with sums a rounding apart
    )  # fmt: skip
    sequences, most_q, most_k = _sizes(q, k, starts_q, most_q, most_k)
    sizes = heads, heads // key_heads, q.size(2), k.size(2)
    shared = (starts_q, starts_k, seed, *(s for x in strides for s in x), *sizes)
    extra = _extra(seed, starts_q, softcap)
    kind = q.element_size(), channels, extra, capability(q.device)
    tile = _launch("grad_queries", q, k, extra, queries_tile(*kind))
    tiles = ceil_div(most_q, tile["BLOCK_M"])
    _causal_attention_grad_queries[(tiles * heads * sequences,)](
        *tensors, power, delta, gradients[0], *shared, tiles, *values, -scale if negative else scale, INSIDE=inside,
        **constants, **tile,
    )  # fmt: skip
    tile = _launch("grad_keys", q, k, extra, keys_tile(*kind))
    tiles = ceil_div(most_k, tile["BLOCK_N"])
    if not tiles:
        return tuple(gradients)
    shares, grouped = gradients[1:], heads != key_heads
    if grouped:
        shares = [x.new_empty((*q.shape[:2], *x.shape[2:]), dtype=torch.float32) for x in shares]
    elif heads_inside(v) != heads_inside(k):
        shares[1] = torch.empty_like(shares[0])
    _causal_attention_grad_keys[(tiles * heads * sequences,)](
        *tensors, power, delta, *shares, *shared, tiles, *values, scale, INSIDE=heads_inside(k) and not grouped,
        **constants, **tile,
    )  # fmt: skip
    if grouped:
        shares = [x.unflatten(1, (key_heads, -1)).sum(2).to(q.dtype) for x in shares]
    return gradients[0], alike(shares[0], k), alike(shares[1], v)


def decode_attention(q, k_cache, v_cache, lengths, k, v, scale, window, softcap):
    q, k_cache, v_cache, _, _ = require_heads(q, k_cache, v_cache, None, None, None, in_place=True)
    if k is not None:
        _, k, v, _, _ = require_heads(q, k, v, None, None, None)
    require_lengths(q, k_cache, lengths, k)
    return decode(q, k_cache, v_cache, lengths.contiguous(), k, v, scale, window, softcap, _multiplier(q))
