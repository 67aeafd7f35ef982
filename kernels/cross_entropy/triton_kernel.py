"""cross_entropy on the GPU: a program reads a row once, forward; backward's programs share the row's columns."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common.launch import ceil_div, next_power_of_2
from genai_fast.kernels.common.math_triton import exp2
from genai_fast.kernels.common.rows import dense_like
from genai_fast.kernels.common.tuned import launch
from genai_fast.kernels.cross_entropy.layout import as_rows, dense_layout, require_saved, require_targets, upstream
from genai_fast.kernels.cross_entropy.linear import over_chunks

BLOCK_FORWARD = 4096  # columns a step of a row's program: 16 a thread
BLOCK_BACKWARD, STEPS = 2048, 4  # a step of a program, and its steps
A_THREAD = 16  # columns
FINALISE = 2048
LEAST = 16  # of a block
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _row(row, inner, outer_stride, inner_stride):
    """Where a row begins; rows * classes passes 2**31."""
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def _lead(begin, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """How far `begin` lies after the last multiple of VECTOR elements: from there on 16 bytes are read at a time."""
    return 0 if ALIGNED else (begin - begin // VECTOR * VECTOR).to(tl.int32)


@triton.jit
def _grown(x, most, total):
    """The largest numbers [n], and sums of exp(x - largest), after x [n, VECTOR]: a thread's own, without a barrier."""
    now = tl.maximum(most, tl.max(x, axis=1))
    # Nothing but -inf and NaN so far: any finite number serves, and NaN stays.
    shift = tl.where(now == float("-inf"), 0.0, now)
    terms = exp2((x - shift[:, None]) * LOG2_E)
    return now, total * exp2((most - shift) * LOG2_E) + tl.sum(terms, axis=1)


@triton.jit(do_not_specialize=["ignore_index", "rows", "units"])
def _cross_entropy_forward(
    logits_ptr, target_ptr, loss_ptr, lse_ptr,   # [rows, classes], [rows], [rows], [2, rows]
    rows, units, inner, outer_stride, inner_stride, ignore_index, label_smoothing, z_loss,  # classes = units * UNIT
    SMOOTH: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(1 - e) (lse - x[target]) + e (lse - mean of x) + z lse^2; one program a row."""
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    classes = units * UNIT
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(lse_ptr + rows + row, 0.0)
    else:
        begin = _row(row, inner, outer_stride, inner_stride)
        lead = _lead(begin, VECTOR, ALIGNED)
        aligned = logits_ptr + begin // VECTOR * VECTOR
        column = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        most = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK // VECTOR], tl.float32)
        plain = tl.zeros([BLOCK // VECTOR], tl.float32)
        end = lead + classes
        whole = tl.where(lead > 0, BLOCK, 0)
        after = tl.maximum((end // BLOCK) * BLOCK, whole)
        if lead > 0:  # a block of which the row has only a part
            mask = (column >= lead) & (column < end)
            x = tl.load(aligned + column, mask=mask, other=float("-inf")).to(tl.float32)
            most, total = _grown(x, most, total)
            if SMOOTH:
                plain += tl.sum(tl.where(mask, x, 0.0), axis=1)
        for first in range(whole, after, BLOCK):
            x = tl.load(aligned + first + column).to(tl.float32)
            most, total = _grown(x, most, total)
            if SMOOTH:
                plain += tl.sum(x, axis=1)
        for first in range(after, end, BLOCK):
            mask = first + column < end
            x = tl.load(aligned + first + column, mask=mask, other=float("-inf")).to(tl.float32)
            most, total = _grown(x, most, total)
            if SMOOTH:
                plain += tl.sum(tl.where(mask, x, 0.0), axis=1)
        largest = tl.max(most, axis=0)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        log_sum = tl.log(tl.sum(total * exp2((most - shift) * LOG2_E), axis=0))
        inside = (target >= 0) & (target < classes)
        # A target that is no class reads as NaN.
        hit = tl.load(logits_ptr + begin + target, mask=inside, other=float("nan")).to(tl.float32)
        lse = largest + log_sum
        loss = (1.0 - label_smoothing) * (largest - hit) + log_sum
        if SMOOTH:
            loss += label_smoothing * (largest - tl.sum(plain, axis=0) / classes)
        loss += z_loss * lse * lse
        tl.store(loss_ptr + row, loss)
        tl.store(lse_ptr + row, largest)
        tl.store(lse_ptr + rows + row, log_sum)


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def _cross_entropy_finalise(
    rows_loss_ptr, target_ptr, loss_ptr, count_ptr,   # [rows], [rows], 0-d, 0-d or None
    rows, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum over rows, or their mean if count_ptr is given; one program, in a fixed order."""
    offs = tl.arange(0, BLOCK)
    whole = rows // BLOCK * BLOCK
    total = tl.load(rows_loss_ptr + whole + offs, mask=whole + offs < rows, other=0.0)
    target = tl.load(target_ptr + whole + offs, mask=whole + offs < rows, other=ignore_index)
    count = tl.where(target != ignore_index, 1.0, 0.0)
    for first in range(0, whole, BLOCK):
        total += tl.load(rows_loss_ptr + first + offs)
        count += tl.where(tl.load(target_ptr + first + offs) != ignore_index, 1.0, 0.0)
    loss = tl.sum(total, axis=0)
    if count_ptr is not None:
        counted = tl.sum(count, axis=0)
        loss = tl.where(counted > 0.0, loss / tl.maximum(counted, 1.0), float("nan"))
        tl.store(count_ptr, counted)
    tl.store(loss_ptr, loss)


@triton.jit(do_not_specialize=["ignore_index", "rows", "units"])
def _cross_entropy_backward(
    grad_loss_ptr, logits_ptr, target_ptr, lse_ptr, count_ptr,  # [rows] or 0-d, ..., [2, rows], 0-d or None
    grad_ptr,                                                   # [rows, classes]; may be logits_ptr
    grad_loss_stride, rows, units, splits, inner, outer_stride, inner_stride,  # classes = units * UNIT
    grad_inner, grad_outer_stride, grad_inner_stride, ignore_index, label_smoothing, z_loss,
    UNIT: tl.constexpr, ALIGNED: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = g ((1 + 2 z lse) exp(x - lse) - e / V - (1 - e) onehot(target)); a program has STEPS blocks of a row."""
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    classes = units * UNIT
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    begin = _row(row, inner, outer_stride, inner_stride)
    out = _row(row, grad_inner, grad_outer_stride, grad_inner_stride)
    lead = _lead(begin, VECTOR, ALIGNED)
    aligned = logits_ptr + begin // VECTOR * VECTOR
    # Where both rows lie alike to 16 bytes, the gradient is written as the logits are read.
    alike = _lead(out, VECTOR, ALIGNED) == lead
    aligned_out = grad_ptr + out // VECTOR * VECTOR
    target = tl.load(target_ptr + row)
    most = tl.load(lse_ptr + row)
    log_sum = tl.load(lse_ptr + rows + row)
    g = tl.load(grad_loss_ptr + row * grad_loss_stride)
    if count_ptr is not None:
        g = g / tl.load(count_ptr)
    g = tl.where((target >= 0) & (target < classes), g, float("nan"))
    scale = g * (1.0 + 2.0 * z_loss * (most + log_sum))
    everywhere = g * (label_smoothing / classes)
    ignored = target == ignore_index
    hit = lead + target
    for step in range(STEPS):
        first = (split * STEPS + step) * BLOCK
        offs = first + tl.arange(0, BLOCK)
        inside = (first >= lead) & (first + BLOCK <= lead + classes)
        if inside & alike & ((hit < first) | (hit >= first + BLOCK)):
            if ignored:
                tl.store(aligned_out + offs, tl.zeros([BLOCK], grad_ptr.dtype.element_ty))
            else:
                x = tl.load(aligned + offs).to(tl.float32)
                grad = scale * exp2((x - most) * LOG2_E - log_sum * LOG2_E) - everywhere
                tl.store(aligned_out + offs, grad.to(grad_ptr.dtype.element_ty))
        else:
            mask = (offs >= lead) & (offs < lead + classes)
            x = tl.load(aligned + offs, mask=mask & (target != ignore_index), other=0.0).to(tl.float32)
            grad = scale * exp2((x - most) * LOG2_E - log_sum * LOG2_E) - everywhere
            grad = tl.where(ignored, 0.0, grad - tl.where(offs == hit, g * (1.0 - label_smoothing), 0.0))
            # Vectors are not known to be whole where rows begin anywhere.
            there = aligned_out + offs if ALIGNED else grad_ptr + out + (offs - lead)
            tl.store(there, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def _block(columns, most):
    """(BLOCK, num_warps)"""
    block = min(next_power_of_2(columns), most)
    return block, min(max(block // (32 * A_THREAD), 1), 8)


def _tile(name, logits, rows, width, most):
    block, warps = _block(width, most)
    chosen = launch(f"cross_entropy/{name}", logits, (rows, width), BLOCK=block, num_warps=warps)
    return chosen | {"BLOCK": max(min(chosen["BLOCK"], next_power_of_2(width)), LEAST)}


def _vectors(classes, dtype, *layouts):
    """Constants that say what a thread may load at once, and the widest row from the 16 bytes on in which it begins."""
    vector = 16 // dtype.itemsize
    aligned = all(stride % vector == 0 for layout in layouts for stride in (layout.inner_stride, layout.outer_stride))
    return dict(UNIT=math.gcd(classes, vector), ALIGNED=aligned), classes if aligned else classes + vector - 1


def cross_entropy(logits, target, ignore_index, label_smoothing, z_loss, reduction):
    require_targets(logits, target)
    x, layout = as_rows(logits)
    t = target.contiguous()
    rows, classes = t.numel(), logits.size(-1)
    of_row = logits.new_empty(target.shape, dtype=torch.float32)
    lse = logits.new_empty((2, rows), dtype=torch.float32)
    count = logits.new_empty(() if reduction == "mean" else 0, dtype=torch.float32)
    if rows:
        constants, width = _vectors(classes, x.dtype, layout)
        chosen = _tile("forward", logits, rows, width, BLOCK_FORWARD)
        _cross_entropy_forward[(rows,)](
            x, t, of_row, lse, rows, classes // constants["UNIT"], *layout, ignore_index, label_smoothing, z_loss,
            SMOOTH=label_smoothing != 0.0, **constants, **chosen,
        )  # fmt: skip
    if reduction == "none":
        return of_row, lse, count
    loss = logits.new_empty((), dtype=torch.float32)
    block, warps = _block(rows, FINALISE)
    _cross_entropy_finalise[(1,)](
        of_row, t, loss, count if reduction == "mean" else None, rows, ignore_index, BLOCK=block, num_warps=warps
    )
    return loss, lse, count


def cross_entropy_backward(
    grad_loss, logits, target, lse, count, ignore_index, label_smoothing, z_loss, reduction, inplace=False
):
    """In place: written over the logits, which must be `writable`."""
    require_targets(logits, target)
    require_saved(logits, lse, count, reduction)
    g, g_stride = upstream(grad_loss, target, reduction)
    x, layout = as_rows(logits)
    t = target.contiguous()
    rows, classes = t.numel(), logits.size(-1)
    grad = logits if inplace else dense_like(logits)
    if rows:
        of_grad = layout if inplace else dense_layout(rows, classes)
        constants, width = _vectors(classes, x.dtype, layout, of_grad)
        chosen = _tile("backward", logits, rows, width, BLOCK_BACKWARD)
        steps = min(next_power_of_2(ceil_div(width, chosen["BLOCK"])), STEPS)
        splits = ceil_div(width, steps * chosen["BLOCK"])
        _cross_entropy_backward[(rows * splits,)](
            g, x, t, lse, count if reduction == "mean" else None, grad, g_stride, rows, classes // constants["UNIT"],
            splits, *layout, *of_grad, ignore_index, label_smoothing, z_loss, STEPS=steps, **constants, **chosen,
        )  # fmt: skip
    return grad


linear_cross_entropy = over_chunks(cross_entropy, cross_entropy_backward)
