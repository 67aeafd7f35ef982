"""decode_linear on the GPU: a program multiplies some rows of the weight with every row of x, whole rows at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from genai_fast.kernels.common.activations_triton import activate
from genai_fast.kernels.common.launch import ceil_div, next_power_of_2
from genai_fast.kernels.common.rows import as_matrix
from genai_fast.kernels.common.tuned import launch
from genai_fast.kernels.decode_linear.layout import require_operands

PROGRAMS = 528  # four for each multiprocessor of an H100
NUM_WARPS = 4
HELD = 128  # bytes of the weight a thread, all on their way at once; more would spill beside a row of x
HELD_OF_X = 32  # columns a thread


@triton.jit
def _decode_linear(
    x_ptr, weight_ptr, bias_ptr,             # [ROWS, K], [N, K], [N] or None
    norm_weight_ptr, norm_bias_ptr,          # [K]; the first None: no norm; the second may be None
    residual_ptr, y_ptr,                     # [ROWS, N], the first may be None
    N, K, x_stride, weight_stride, residual_stride, eps,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = activate(layer_norm(x) weight^T + bias) + residual for BLOCK_N columns of y; BLOCK_K holds K.

    A row's sums have one order, however many rows there are.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    outputs, inside = n < N, k < K
    # Before all else: it is on its way while the statistics of x are computed. N * K passes 2**31.
    weight_at = weight_ptr + (n.to(tl.int64) * weight_stride)[:, None] + k[None, :]
    weight = tl.load(weight_at, mask=outputs[:, None] & inside[None, :], other=0.0)
    if norm_weight_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if norm_bias_ptr is not None:
        norm_bias = tl.load(norm_bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=outputs, other=0.0).to(tl.float32)
    tl.debug_barrier()  # the compiler moves loads down to where they are needed, but not past this
    for _ in range(ROWS):
        x = tl.load(x_ptr + k, mask=inside, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + n, mask=outputs, other=0.0).to(tl.float32)
        if norm_weight_ptr is not None:
            x = tl.where(inside, x - tl.sum(x, axis=0) / K, 0.0)
            x = x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / K + eps)) * norm_weight
            if norm_bias_ptr is not None:
                x += norm_bias
        y = tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
        if bias_ptr is not None:
            y += bias
        y = activate(y, 0.0, ACTIVATION)
        if residual_ptr is not None:
            y += residual
            residual_ptr += residual_stride
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=outputs)
        x_ptr += x_stride
        y_ptr += N


def _tile(weight):
    """BLOCK_N, BLOCK_K and warps of a weight; x's rows have no say in it, since it makes the order of sums."""
    outputs, columns = weight.shape
    block_n = next_power_of_2(outputs // PROGRAMS + 1) // 2  # a power of two that leaves so many programs
    chosen = launch(
        "decode_linear/forward", weight, (outputs, columns), BLOCK_N=min(max(block_n, 2), 16), num_warps=NUM_WARPS
    )
    # Two products a thread at least. The compiler fuses a lone one into the sum over the warp, whose lanes then differ
    # in the last bit.
    block_k = max(next_power_of_2(columns), 64 * chosen["num_warps"])
    warps = max(chosen["num_warps"], block_k // (32 * HELD_OF_X))
    most = 32 * warps * HELD // (block_k * weight.element_size())
    return dict(BLOCK_N=min(chosen["BLOCK_N"], most), BLOCK_K=block_k, num_warps=warps)


def decode_linear(x, weight, bias, norm_weight, norm_bias, eps, activation, residual):
    require_operands(x, weight, bias, norm_weight, norm_bias, residual)
    y = x.new_empty((*x.shape[:-1], weight.size(0)))
    if not y.numel():
        return y
    matrix, stride = as_matrix(x)
    added, added_stride = (None, 0) if residual is None else as_matrix(residual)
    bias, norm_weight, norm_bias = (p if p is None else p.contiguous() for p in (bias, norm_weight, norm_bias))
    tile = _tile(weight)
    _decode_linear[(ceil_div(weight.size(0), tile["BLOCK_N"]),)](
        matrix, weight, bias, norm_weight, norm_bias, added, y, *weight.shape, stride, weight.stride(0), added_stride,
        eps, ROWS=len(matrix), ACTIVATION=activation, **tile,
    )  # fmt: skip
    return y
