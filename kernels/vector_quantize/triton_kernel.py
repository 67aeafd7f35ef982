"""vector_quantize and segment_sum on the GPU: products of tiles with a running argmax, and sums of sorted rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common.launch import ceil_div, next_power_of_2
from genai_fast.kernels.common.recorder import as_step
from genai_fast.kernels.common.tuned import launch
from genai_fast.kernels.vector_quantize.layout import matrix, require_codes, require_indices

LONGEST = 32  # columns of a step of a product: more of them spill, since products in full take no tensor cores
SUMMED = 1024  # numbers that a step of a sum reads: 16 rows of 64, about as many as choose a code


@triton.jit
def _vector_quantize(
    x_ptr, codebook_ptr,                     # [N, D], [K, D]
    quantized_ptr, indices_ptr,              # [N, D], [N]
    rows, codes, columns, x_stride, codebook_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The code with the largest x e - |e|^2 / 2 for BLOCK_N rows; products in full: TF32 would choose others."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < rows
    x_ptr += row.to(tl.int64)[:, None] * x_stride
    offs_d = tl.arange(0, BLOCK_D)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, codes, BLOCK_K):
        code = first + tl.arange(0, BLOCK_K)
        known = code < codes
        at = codebook_ptr + code.to(tl.int64)[None, :] * codebook_stride
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        square = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, columns, BLOCK_D):
            d = start + offs_d
            inside = d < columns
            x = tl.load(x_ptr + d[None, :], mask=exists[:, None] & inside[None, :], other=0.0).to(tl.float32)
            e = tl.load(at + d[:, None], mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)
            acc = tl.dot(x, e, acc, input_precision="ieee")
            square += tl.sum(e * e, axis=0)
        score = acc - 0.5 * square[None, :]
        score = tl.where(known[None, :] & (tl.abs(score) < float("inf")), score, float("-inf"))
        most, position = tl.max(score, axis=1, return_indices=True)  # of equal ones the first
        better = most > best
        best = tl.where(better, most, best)
        index = tl.where(better, first + position, index)
    tl.store(indices_ptr + row, index.to(tl.int64), mask=exists)
    at = codebook_ptr + index.to(tl.int64)[:, None] * codebook_stride
    quantized_ptr += row.to(tl.int64)[:, None] * columns
    for start in range(0, columns, BLOCK_D):
        d = start + offs_d
        mask = exists[:, None] & (d < columns)[None, :]
        tl.store(quantized_ptr + d[None, :], tl.load(at + d[None, :], mask=mask), mask=mask)


@triton.jit
def _segment_sum(
    x_ptr, order_ptr, bounds_ptr,            # [N, D], [N]: rows by segment, [K + 1]: where each begins there
    sums_ptr, counts_ptr,                    # [K, D], [K]
    columns, x_stride, parts,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum of a segment's rows, BLOCK_D columns a program, in an order that their number alone decides."""
    segment, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    begin, end = tl.load(bounds_ptr + segment), tl.load(bounds_ptr + segment + 1)
    column = part * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < columns
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        row = tl.load(order_ptr + at, mask=at < end, other=0)
        given = x_ptr + row[:, None] * x_stride + column[None, :]
        total += tl.load(given, mask=(at < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    tl.store(sums_ptr + segment.to(tl.int64) * columns + column, tl.sum(total, axis=0), mask=inside)
    if part == 0:
        tl.store(counts_ptr + segment, (end - begin).to(tl.float32))


def vector_quantize(x, codebook):
    require_codes(x, codebook)
    quantized, indices = codebook.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.int64)
    if not indices.numel():
        return quantized, indices
    (given, x_stride), (codes, stride) = matrix(x), matrix(codebook)
    rows, columns = given.shape
    tile = launch(
        "vector_quantize/forward", x, (codes.size(0), columns), BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=2
    )
    block_d = min(max(next_power_of_2(columns), 16), LONGEST)
    _vector_quantize[(ceil_div(rows, tile["BLOCK_N"]),)](
        given, codes, quantized, indices, rows, codes.size(0), columns, x_stride, stride, BLOCK_D=block_d, **tile
    )
    return quantized, indices


def _sorted(indices, segments):
    """Rows by segment, and where each segment begins among them."""
    ordered, order = indices.flatten().sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(segments + 1, device=indices.device))


def segment_sum(x, indices, segments):
    require_indices(x, indices, segments)
    columns = x.size(-1)
    sums = x.new_empty((segments, columns), dtype=torch.float32)
    counts = x.new_empty(segments, dtype=torch.float32)
    if not segments:
        return sums, counts
    order, bounds = as_step(_sorted, indices, segments)
    given, x_stride = matrix(x)
    block_d = min(max(next_power_of_2(columns), 1), SUMMED // 16)
    parts = max(ceil_div(columns, block_d), 1)
    tile = dict(BLOCK_N=SUMMED // block_d, BLOCK_D=block_d, num_warps=1)  # a warp adds up without shared memory
    _segment_sum[(segments * parts,)](given, order, bounds, sums, counts, columns, x_stride, parts, **tile)
    return sums, counts
