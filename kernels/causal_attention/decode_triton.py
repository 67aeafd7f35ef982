"""decode_attention on the GPU: the cache is split over its length, and the parts are combined in their order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.causal_attention.layout import empty_alike
from genai_fast.kernels.causal_attention.tiles import padded
from genai_fast.kernels.causal_attention.tiles_triton import head_at, wide
from genai_fast.kernels.common.dot_triton import dot
from genai_fast.kernels.common.launch import ceil_div, next_power_of_2

LOG2_E = 1.4426950408889634
PROGRAMS = 264  # two for each multiprocessor of an H100
LEAST_BLOCKS = 2  # of keys a split: fewer cost more in partial sums than they save
MOST_SPLITS = 64


@triton.jit
def _held(lengths_ptr, sample, added, room):
    """(tokens that the cache holds with `added` new ones, whether it has room for them)"""
    length = tl.load(lengths_ptr + sample).to(tl.int32)
    return length + added, (length >= 0) & (length + added <= room)


@triton.jit
def _decode_append(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr,  # [B, H_kv, T, D] twice, [B, H_kv, room, D] twice
    lengths_ptr,                             # [B]
    k_b, k_h, k_t, v_b, v_h, v_t, kc_b, kc_h, kc_t, vc_b, vc_h, vc_t, key_heads, added, room,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One new key and value of one head, to their place in the cache."""
    row = tl.program_id(0) % added
    head = tl.program_id(0) // added % key_heads
    sample = tl.program_id(0) // added // key_heads
    end, fits = _held(lengths_ptr, sample, added, room)
    place = end - added + row
    channel = tl.arange(0, BLOCK_D)
    mask = (channel < D) & fits
    k = tl.load(head_at(k_ptr, sample, head, row, k_b, k_h, k_t) + channel, mask=mask)
    v = tl.load(head_at(v_ptr, sample, head, row, v_b, v_h, v_t) + channel, mask=mask)
    tl.store(head_at(k_cache_ptr, sample, head, place, kc_b, kc_h, kc_t) + channel, k, mask=mask)
    tl.store(head_at(v_cache_ptr, sample, head, place, vc_b, vc_h, vc_t) + channel, v, mask=mask)


@triton.jit
def _load_rows(cache_ptr, key, end, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [BLOCK_N, BLOCK_D] of a cache; 0 from `end` on, where anything may lie."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = (key < end)[:, None]
    if D < BLOCK_D:
        mask &= channel < D
    return tl.load(cache_ptr + (wide(key) * stride)[:, None] + channel, mask=mask, other=0.0)


@triton.jit
def _decode_split(
    q_ptr, k_cache_ptr, v_cache_ptr,         # [B, H, T, D], [B, H_kv, room, D] twice
    lengths_ptr,                             # [B]
    sum_ptr, most_ptr, total_ptr,            # [splits, B, H, T, D], [splits, B, H, T] twice
    q_b, q_h, q_t, kc_b, kc_h, kc_t, vc_b, vc_h, vc_t,
    heads, key_heads, queries, added, room, rows_of_all, window, scale, cap, cap_inverse,
    D: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one key head, for BLOCK_M of the queries of all heads that read it.

    Scores are in units of ln 2: `scale` and `cap` hold its inverse.
    """
    sample = tl.program_id(0) // key_heads
    key_head = tl.program_id(0) % key_heads
    split = tl.program_id(1)
    group = heads // key_heads
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)  # head by head
    rows = row < group * queries
    head = key_head * group + row // queries
    query = row % queries
    end, fits = _held(lengths_ptr, sample, added, room)
    end = tl.where(fits, end, 0)
    channel = tl.arange(0, BLOCK_D)
    q_at = head_at(q_ptr, sample, head, query, q_b, q_h, q_t)
    q = tl.load(q_at[:, None] + channel[None, :], mask=rows[:, None] & (channel < D)[None, :], other=0.0)
    k_cache_ptr = head_at(k_cache_ptr, sample, key_head, 0, kc_b, kc_h, kc_t)
    v_cache_ptr = head_at(v_cache_ptr, sample, key_head, 0, vc_b, vc_h, vc_t)
    position = end - queries + query
    # Blocks that some query sees, in equal parts.
    start = 0
    if WINDOWED:
        start = tl.maximum(end - queries - window + 1, 0) // BLOCK_N * BLOCK_N
    blocks = tl.cdiv(tl.maximum(end - start, 0), BLOCK_N)
    part = tl.cdiv(blocks, tl.num_programs(1))
    first = start + tl.minimum(split * part, blocks) * BLOCK_N
    last = tl.minimum(first + part * BLOCK_N, end)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for begin in range(first, last, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        k = _load_rows(k_cache_ptr, key, end, kc_t, D, BLOCK_D)
        v = _load_rows(v_cache_ptr, key, end, vc_t, D, BLOCK_D)
        score = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, UPCAST) * scale
        if CAPPED:
            e = tl.exp2(tl.abs(score * cap_inverse) * -2.8853900817779268)
            tanh = (1.0 - e) / (1.0 + e)
            score = cap * tl.where(score < 0.0, -tanh, tanh)
        back = position[:, None] - key[None, :]
        visible = back >= 0
        if WINDOWED:
            visible &= back < window
        score = tl.where(visible, score, float("-inf"))
        larger = tl.maximum(most, tl.max(score, axis=1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        weight = tl.exp2(score - shift[:, None])
        shrunk = tl.exp2(most - shift)
        total = total * shrunk + tl.sum(weight, axis=1)
        acc = dot(weight.to(v.dtype), v, acc * shrunk[:, None], PRECISION, UPCAST)
        most = larger
    at = wide(split) * rows_of_all + (wide(sample) * heads + head) * queries + query
    tl.store(most_ptr + at, most, mask=rows)
    tl.store(total_ptr + at, tl.where(fits, total, float("nan")), mask=rows)
    tl.store(sum_ptr + at[:, None] * D + channel[None, :], acc, mask=rows[:, None] & (channel < D)[None, :])


@triton.jit
def _decode_combine(
    sum_ptr, most_ptr, total_ptr,            # [splits, B, H, T, D], [splits, B, H, T] twice
    out_ptr, lse_ptr,                        # [B, H, T, D], [B, H, T]
    out_b, out_h, out_t, heads, queries, rows_of_all, splits,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One query: out = sum of the parts, each shrunk to the largest score of all; BLOCK_S holds all splits."""
    row = tl.program_id(0)
    split = tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_D)
    at = wide(split) * rows_of_all + row
    most = tl.load(most_ptr + at, mask=split < splits, other=float("-inf"))
    total = tl.load(total_ptr + at, mask=split < splits, other=0.0)
    largest = tl.max(most, axis=0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    share = tl.exp2(most - shift)
    sum_of_all = tl.sum(share * total, axis=0)
    mask = (split < splits)[:, None] & (channel < D)[None, :]
    parts = tl.load(sum_ptr + at[:, None] * D + channel[None, :], mask=mask, other=0.0)
    out = tl.sum(parts * share[:, None], axis=0) / tl.where(sum_of_all == 0.0, 1.0, sum_of_all)
    tl.store(lse_ptr + row, (shift + tl.log2(sum_of_all)) * 0.6931471805599453)
    sample = row // (heads * queries)
    out_at = head_at(out_ptr, sample, row // queries % heads, row % queries, out_b, out_h, out_t)
    tl.store(out_at + channel, out.to(out_ptr.dtype.element_ty), mask=channel < D)


def keys_a_step(size: int, channels: int) -> int:
    """BLOCK_N: 16 KiB of keys, of elements of `size` bytes."""
    return max(min(16384 // (size * padded(channels)), 64), 16)


def rows_a_program(rows: int, size: int, channels: int) -> int:
    """BLOCK_M: query rows of one key head, as many as registers hold: few in float32, without matrix instructions."""
    most = 16 if size == 4 else 64 if padded(channels) <= 64 else 32
    return min(max(next_power_of_2(rows), 16), most)


def decode(q, k_cache, v_cache, lengths, k, v, scale, window, softcap, multiplier):
    """Launches both kernels; `multiplier`: how tl.dot multiplies."""
    batch, heads, queries, channels = q.shape
    key_heads, room = k_cache.size(1), k_cache.size(2)
    out = empty_alike(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not q.numel():
        return out, lse
    block_m = rows_a_program(heads // key_heads * queries, q.element_size(), channels)
    block_d = padded(channels)
    block_n = keys_a_step(q.element_size(), channels)
    row_blocks = ceil_div(heads // key_heads * queries, block_m)
    # From sizes alone, so that every run adds in the same order.
    splits = min(
        ceil_div(PROGRAMS, batch * key_heads * row_blocks), ceil_div(room, LEAST_BLOCKS * block_n), MOST_SPLITS
    )
    splits = max(splits, 1)
    rows = batch * heads * queries
    parts = torch.empty((splits, rows, channels), dtype=torch.float32, device=q.device)
    most, total = torch.empty((2, splits, rows), dtype=torch.float32, device=q.device)
    caches = [s for x in (k_cache, v_cache) for s in x.stride()[:3]]
    added = 0 if k is None else queries
    if added:
        _decode_append[(batch * key_heads * added,)](
            k, v, k_cache, v_cache, lengths, *k.stride()[:3], *v.stride()[:3], *caches, key_heads, added, room,
            D=channels, BLOCK_D=block_d, num_warps=1,
        )  # fmt: skip
    _decode_split[(batch * key_heads, splits, row_blocks)](
        q, k_cache, v_cache, lengths, parts, most, total, *q.stride()[:3], *caches, heads, key_heads, queries, added,
        room, rows, window, scale * LOG2_E, softcap * LOG2_E, 1.0 / (softcap * LOG2_E) if softcap else 0.0,
        D=channels, CAPPED=softcap != 0.0, WINDOWED=window > 0, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        **multiplier, num_stages=2 if block_d * q.element_size() == 1024 else 3,
    )  # fmt: skip
    _decode_combine[(rows,)](
        parts, most, total, out, lse, *out.stride()[:3], heads, queries, rows, splits,
        D=channels, BLOCK_S=next_power_of_2(splits), BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return out, lse
