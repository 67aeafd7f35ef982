"""Gradients of causal_attention on the GPU: the probabilities are computed again from q, k and the lse.

Keys and queries have a kernel each: every sum belongs to one program and runs in one order, without atomics.
"""

import triton
import triton.language as tl

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


@triton.jit
def _place(starts_q_ptr, starts_k_ptr, heads, queries, keys, tiles):
    """This program's head and sample, and where its sequence of queries and of keys begins and how long it is."""
    head = tl.program_id(0) // tiles % heads
    index = tl.program_id(0) // tiles // heads
    begin_q, count_q = sequence_of(starts_q_ptr, index, queries)
    begin_k, count_k = sequence_of(starts_k_ptr, index, keys)
    sample = index
    if starts_q_ptr is not None:
        sample = 0
    return head, sample, begin_q, count_q, begin_k, count_k


@triton.jit(do_not_specialize=["queries", "tiles"])
def _causal_attention_summary(
    grad_ptr, out_ptr, lse_ptr, grad_lse_ptr,    # [B, H, queries, D] twice, [B, H, queries] twice, the last or None
    power_ptr, delta_ptr,                        # [B, H, queries] twice
    grad_batch, grad_head, grad_row, out_batch, out_head, out_row, heads, queries, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of each row: its lse in units of ln 2, and delta = sum dO O - d lse."""
    first = tl.program_id(0) % tiles * BLOCK_M
    head = tl.program_id(0) // tiles % heads
    sample = tl.program_id(0) // tiles // heads
    grad_ptr = head_at(grad_ptr, sample, head, 0, grad_batch, grad_head, grad_row)
    out_ptr = head_at(out_ptr, sample, head, 0, out_batch, out_head, out_row)
    grad = rows_of(grad_ptr, first, grad_row, queries, D, BLOCK_D, BLOCK_M, True)
    out = rows_of(out_ptr, first, out_row, queries, D, BLOCK_D, BLOCK_M, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    offs = first + tl.arange(0, BLOCK_M)
    row = (wide(sample) * heads + head) * queries + offs
    mask = offs < queries
    lse = tl.load(lse_ptr + row, mask=mask, other=0.0)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + row, mask=mask, other=0.0)
    power = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)  # a row that sees nothing: 2^-inf
    tl.store(power_ptr + row, power, mask=mask)
    tl.store(delta_ptr + row, delta, mask=mask)


@triton.jit
def _keys_step(
    grad_k, grad_v, k, v, q_ptr, grad_ptr, power_ptr, delta_ptr,  # [N, BLOCK_D] four times; queries of the head
    query, queries, q_row, grad_row, shift, offs_k, keys, window, scale, cap,
    seed, drop_row, offset, pitch, column, bound, grown,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The sums over one more tile of queries. Scores stand as [keys, queries], as the products want them."""
    q = rows_of(q_ptr, query, q_row, queries, D, BLOCK_D, BLOCK_M, MASK)
    offs = query + tl.arange(0, BLOCK_M)
    # Queries that do not exist have probabilities of 2^-inf.
    if MASK:  # noqa: SIM108
        power = tl.load(power_ptr + offs, mask=offs < queries, other=float("inf"))
    else:
        power = tl.load(power_ptr + offs)
    score = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION, UPCAST) * scale
    if CAPPED:
        capped = tanh(score)
        score = capped * cap
    if MASK:
        visible = seen((offs + shift)[None, :], offs_k[:, None], keys, window, CAUSAL, WINDOWED)
        p = tl.where(visible, tl.exp2(score - power[None, :]), 0.0)
    else:
        p = tl.exp2(score - power[None, :])
    grad = rows_of(grad_ptr, query, grad_row, queries, D, BLOCK_D, BLOCK_M, MASK)
    grad_p = dot(v, tl.trans(grad), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION, UPCAST)
    kept_p = p
    if seed is not None:
        keep = tl.trans(kept(seed, drop_row + offs, offset, pitch, column, bound, ALIGNED, BLOCK_N))
        kept_p = tl.where(keep, p, 0.0)
        grad_p = tl.where(keep, grad_p * grown, 0.0)
    grad_v = dot(kept_p, grad, grad_v, PRECISION, UPCAST)
    if MASK:  # noqa: SIM108
        delta = tl.load(delta_ptr + offs, mask=offs < queries, other=0.0)
    else:
        delta = tl.load(delta_ptr + offs)
    grad_score = p * (grad_p - delta[None, :])
    if CAPPED:
        grad_score *= 1.0 - capped * capped
    if MASK:
        grad_score = tl.where(visible, grad_score, 0.0)
    grad_k = dot(grad_score, q, grad_k, PRECISION, UPCAST)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["queries", "keys", "tiles", "window", "offset", "bound"])
def _causal_attention_grad_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr,           # [B, H, queries, D], [B, H / group, keys, D] twice, as q
    power_ptr, delta_ptr,                    # [B, H, queries] twice
    grad_k_ptr, grad_v_ptr,                  # [B, H, keys, D] twice: each query head's share
    starts_q_ptr, starts_k_ptr, seed_ptr,    # as forward
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    heads, group, queries, keys, tiles, scale, cap, window, offset, bound, grown, out_scale, INSIDE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dV = (keep P)^T dO, dK = out_scale dS^T Q: BLOCK_N keys a program, over all queries of one head that see them."""
    first = tl.program_id(0) % tiles * BLOCK_N
    head, sample, begin_q, count_q, begin_k, count_k = _place(starts_q_ptr, starts_k_ptr, heads, queries, keys, tiles)
    if starts_q_ptr is not None:  # noqa: SIM102
        if first >= count_k:
            return
    q_ptr = head_at(q_ptr, sample, head, begin_q, q_batch, q_head, q_row)
    grad_ptr = head_at(grad_ptr, sample, head, begin_q, grad_batch, grad_head, grad_row)
    k_ptr = head_at(k_ptr, sample, head // group, begin_k, k_batch, k_head, k_row)
    v_ptr = head_at(v_ptr, sample, head // group, begin_k, v_batch, v_head, v_row)
    row = (wide(sample) * heads + head) * queries + begin_q
    k = rows_of(k_ptr, first, k_row, count_k, D, BLOCK_D, BLOCK_N, True)
    v = rows_of(v_ptr, first, v_row, count_k, D, BLOCK_D, BLOCK_N, True)
    shift = count_k - count_q
    below = window - 1
    if CAUSAL:
        below = 0
    last = tl.minimum(first + BLOCK_N, count_k) - 1
    start, whole, rest, end = span(
        first - shift, last - shift, below, window - 1, count_q, CAUSAL or WINDOWED, WINDOWED, BLOCK_M
    )
    seed = seed_ptr
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    pitch = (keys + 3) // 4 * 4
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for part in tl.static_range(
        0 if CAUSAL or WINDOWED else 1, 3
    ):  # before, among, behind the queries that see them all
        if part == 0:
            low, high = start, tl.minimum(whole, end)
        elif part == 1:
            low, high = whole, rest
        else:
            low, high = rest, end
        for query in range(low, high, BLOCK_M):
            grad_k, grad_v = _keys_step(
                grad_k, grad_v, k, v, q_ptr, grad_ptr, power_ptr + row, delta_ptr + row,
                query, count_q, q_row, grad_row, shift, first + tl.arange(0, BLOCK_N), count_k, window, scale, cap,
                seed, row, offset, pitch, begin_k + first, bound, grown,
                part != 1, CAUSAL, WINDOWED, CAPPED, ALIGNED, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, UPCAST,
            )  # fmt: skip
    grad_k_at, stride = dense_at(grad_k_ptr, sample, head, begin_k, heads, keys, D, INSIDE)
    grad_v_at, stride = dense_at(grad_v_ptr, sample, head, begin_k, heads, keys, D, INSIDE)
    store_rows(grad_k_at, grad_k * out_scale, first, stride, count_k, D, BLOCK_D, BLOCK_N)
    store_rows(grad_v_at, grad_v * grown, first, stride, count_k, D, BLOCK_D, BLOCK_N)


@triton.jit
def _queries_step(
    grad_q, q, grad, power, delta, k_ptr, v_ptr,  # [M, BLOCK_D] three times, [M] twice; keys of the head
    key, keys, k_row, v_row, position, window, scale, cap,
    seed, drop_row, offset, pitch, column, bound, grown,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The sum over one more tile of keys."""
    k = rows_of(k_ptr, key, k_row, keys, D, BLOCK_D, BLOCK_N, MASK)
    v = rows_of(v_ptr, key, v_row, keys, D, BLOCK_D, BLOCK_N, MASK)
    score = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, UPCAST) * scale
    if CAPPED:
        capped = tanh(score)
        score = capped * cap
    if MASK:
        visible = seen(position[:, None], key + tl.arange(0, BLOCK_N)[None, :], keys, window, CAUSAL, WINDOWED)
        p = tl.where(visible, tl.exp2(score - power[:, None]), 0.0)
    else:
        p = tl.exp2(score - power[:, None])
    grad_p = dot(grad, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, UPCAST)
    if seed is not None:
        keep = kept(seed, drop_row, offset, pitch, column + key, bound, ALIGNED, BLOCK_N)
        grad_p = tl.where(keep, grad_p * grown, 0.0)
    grad_score = p * (grad_p - delta[:, None])
    if CAPPED:
        grad_score *= 1.0 - capped * capped
    if MASK:
        grad_score = tl.where(visible, grad_score, 0.0)
    return dot(grad_score, k, grad_q, PRECISION, UPCAST)


@triton.jit(do_not_specialize=["queries", "keys", "tiles", "window", "offset", "bound"])
def _causal_attention_grad_queries(
    q_ptr, k_ptr, v_ptr, grad_ptr,           # [B, H, queries, D], [B, H / group, keys, D] twice, as q
    power_ptr, delta_ptr, grad_q_ptr,        # [B, H, queries] twice, [B, H, queries, D]
    starts_q_ptr, starts_k_ptr, seed_ptr,    # as forward
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    heads, group, queries, keys, tiles, scale, cap, window, offset, bound, grown, out_scale, INSIDE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ = out_scale dS K: BLOCK_M queries of one head a program, those with the most keys first."""
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    head, sample, begin_q, count_q, begin_k, count_k = _place(starts_q_ptr, starts_k_ptr, heads, queries, keys, tiles)
    if starts_q_ptr is not None:  # noqa: SIM102
        if first >= count_q:
            return
    q_ptr = head_at(q_ptr, sample, head, begin_q, q_batch, q_head, q_row)
    grad_ptr = head_at(grad_ptr, sample, head, begin_q, grad_batch, grad_head, grad_row)
    k_ptr = head_at(k_ptr, sample, head // group, begin_k, k_batch, k_head, k_row)
    v_ptr = head_at(v_ptr, sample, head // group, begin_k, v_batch, v_head, v_row)
    q = rows_of(q_ptr, first, q_row, count_q, D, BLOCK_D, BLOCK_M, True)
    grad = rows_of(grad_ptr, first, grad_row, count_q, D, BLOCK_D, BLOCK_M, True)
    offs = first + tl.arange(0, BLOCK_M)
    row = (wide(sample) * heads + head) * queries + begin_q + offs
    power = tl.load(power_ptr + row, mask=offs < count_q, other=float("inf"))
    delta = tl.load(delta_ptr + row, mask=offs < count_q, other=0.0)
    shift = count_k - count_q
    above = window - 1
    if CAUSAL:
        above = 0
    start, whole, rest, end = span(
        first + shift, first + shift + (BLOCK_M - 1), window - 1, above, count_k, WINDOWED, CAUSAL or WINDOWED, BLOCK_N
    )
    seed = seed_ptr
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    pitch = (keys + 3) // 4 * 4
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(0 if WINDOWED else 1, 3):  # before, among and behind the keys that all queries see
        if part == 0:
            low, high = start, tl.minimum(whole, end)
        elif part == 1:
            low, high = whole, rest
        else:
            low, high = rest, end
        for key in range(low, high, BLOCK_N):
            grad_q = _queries_step(
                grad_q, q, grad, power, delta, k_ptr, v_ptr, key, count_k, k_row, v_row, offs + shift, window, scale,
                cap, seed, row, offset, pitch, begin_k, bound, grown,
                part != 1, CAUSAL, WINDOWED, CAPPED, ALIGNED, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, UPCAST,
            )  # fmt: skip
    grad_q_at, stride = dense_at(grad_q_ptr, sample, head, begin_q, heads, queries, D, INSIDE)
    store_rows(grad_q_at, grad_q * out_scale, first, stride, count_q, D, BLOCK_D, BLOCK_M)
