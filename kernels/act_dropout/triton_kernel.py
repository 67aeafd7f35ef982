"""act_dropout on the GPU: four elements a Philox call, in the order of memory; backward draws the words again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.act_dropout.reference import dense
from genai_fast.kernels.common.activations_triton import activate, times_derivative, times_derivative_from_output
from genai_fast.kernels.common.channels import like_layout
from genai_fast.kernels.common.launch import ceil_div
from genai_fast.kernels.common.philox import scale, threshold
from genai_fast.kernels.common.philox_triton import words
from genai_fast.kernels.common.rows import require_alike, require_seed
from genai_fast.kernels.common.tuned import launch

BLOCK = 1024  # elements a program: 8 a thread, two Philox calls
NUM_WARPS = 4


@triton.jit
def _tile(count, offset, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask [BLOCK] of this program."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if not ALIGNED:  # the first element stands inside a counter's four lanes
        offs -= offset & 3
    return offs, (offs >= 0) & (offs < count)


@triton.jit
def _kept(seed_ptr, offset, bound, BLOCK: tl.constexpr):
    """Whether each element's word is above `bound`, which holds 32 bits without a sign."""
    counter = (offset >> 2) + tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = words(tl.load(seed_ptr), counter)
    stream = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])
    return stream > bound.to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["offset", "bound"])
def _act_dropout_forward(
    x_ptr, y_ptr, seed_ptr,                  # [count] twice; int64 scalar, or None to keep all
    count, offset, bound, scale, slope,
    ACTIVATION: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = activate(x) scale where kept, else 0."""
    offs, mask = _tile(count, offset, ALIGNED, BLOCK)
    y = activate(tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32), slope, ACTIVATION)
    if seed_ptr is not None:
        y = tl.where(_kept(seed_ptr, offset, bound, BLOCK), y * scale, 0.0)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["offset", "bound"])
def _act_dropout_backward(
    grad_y_ptr, saved_ptr, grad_x_ptr,       # [count]: saved is y = activate(x) / share if FROM_OUTPUT, else x
    seed_ptr,                                # int64 scalar, or None to keep all
    count, offset, bound, scale, share, slope,
    ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = dy act'(x) scale where kept, else 0."""
    offs, mask = _tile(count, offset, ALIGNED, BLOCK)
    grad = tl.load(grad_y_ptr + offs, mask=mask, other=0.0).to(tl.float32) * scale
    saved = tl.load(saved_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if FROM_OUTPUT and ACTIVATION == "relu":  # y > 0 says both: kept, and x > 0
        grad = tl.where(saved > 0.0, grad, 0.0)
    else:
        if FROM_OUTPUT:
            grad = times_derivative_from_output(grad, saved * share, slope, ACTIVATION)
        else:
            grad = times_derivative(grad, saved, slope, ACTIVATION)
        if seed_ptr is not None:
            grad = tl.where(_kept(seed_ptr, offset, bound, BLOCK), grad, 0.0)
    tl.store(grad_x_ptr + offs, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _launch(name, x, seed, p, offset):
    """Grid, seed or None, (count, offset, bound, scale, share), and the constants; offset and p need a draw."""
    if seed is not None:
        require_seed(seed, x)
    limit, count = threshold(p), x.numel()
    if seed is None or not limit:
        seed, offset, limit, p = None, 0, 1, 0.0
    bound = limit - 1 if limit <= 2**31 else limit - 1 - 2**32  # the largest word dropped, as 32 bits
    constants = launch(f"act_dropout/{name}", x, (count,), BLOCK=BLOCK, num_warps=NUM_WARPS)
    grid = (ceil_div(count + offset % 4, constants["BLOCK"]),)
    constants["ALIGNED"] = offset % 4 == 0
    return grid, seed, (count, offset, bound, scale(p), 1.0 - p), constants


def act_dropout(x, seed, p, offset, activation, slope):
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel():
        grid, seed, sizes, constants = _launch("forward", x, seed, p, offset)
        _act_dropout_forward[grid](x, y, seed, *sizes[:4], slope, ACTIVATION=activation, **constants)
    return y


def act_dropout_backward(grad_y, saved, seed, p, offset, from_output, activation, slope):
    require_alike(saved, grad_y)
    saved = dense(saved)
    grad_y = like_layout(grad_y, saved)
    grad_x = torch.empty_like(saved)
    if saved.numel():
        grid, seed, sizes, constants = _launch("backward", saved, seed, p, offset)
        _act_dropout_backward[grid](
            grad_y, saved, grad_x, seed, *sizes, slope, ACTIVATION=activation, FROM_OUTPUT=from_output, **constants
        )
    return grad_x
