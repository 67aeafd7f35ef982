"""cross_entropy on the GPU: a program reads a row once, forward; backward's programs share the row's columns."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common.activations_triton import tanh
from genai_fast.kernels.common.launch import ceil_div, next_power_of_2
from genai_fast.kernels.common.math_triton import exp2
from genai_fast.kernels.common.rows import dense_like
from genai_fast.kernels.common.tuned import launch
from genai_fast.kernels.cross_entropy.layout import (
    as_rows,
    dense_layout,
    require_saved,
    require_targets,
    upstream,
    weights_of,
)
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


@triton.jit
def _seen(
    x, column, known, classes, sums, weight_ptr, cap,
    MASKED: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr, PREDICT: tl.constexpr,
):  # fmt: skip
    """`sums` after logits x [n, VECTOR] of these columns of the row; known: those that it has, if MASKED."""
    most, total, plain, largest, place = sums
    if PREDICT:
        here = tl.max(x, axis=1)
        at = tl.min(tl.where(x == here[:, None], column, classes), axis=1)
        place = tl.where(here > largest, at, place)
        largest = tl.maximum(largest, here)
    if CAPPED:
        x = cap * tanh(x / cap)
        if MASKED:
            x = tl.where(known, x, float("-inf"))
    most, total = _grown(x, most, total)
    if SMOOTH:
        if MASKED:
            x = tl.where(known, x, 0.0)
        if weight_ptr is not None:
            if MASKED:
                x *= tl.load(weight_ptr + column, mask=known, other=0.0)
            else:
                x *= tl.load(weight_ptr + column)
        plain += tl.sum(x, axis=1)
    return most, total, plain, largest, place


@triton.jit(do_not_specialize=["ignore_index", "rows", "units"])
def _cross_entropy_forward(
    logits_ptr, target_ptr, loss_ptr, lse_ptr,   # [rows, classes], [rows], [rows], [2, rows]
    weight_ptr, weight_mean_ptr, predicted_ptr,  # [classes], their mean if SMOOTH, [rows]; each may be None
    rows, units, inner, outer_stride, inner_stride, ignore_index, label_smoothing, z_loss, cap,  # classes: units * UNIT
    SMOOTH: tl.constexpr, CAPPED: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w[target] (1 - e) (lse - x[target]) + e mean(w (lse - x)) + z lse^2, x = cap tanh(logits / cap) if CAPPED.

    One program a row. Predicted is where the logits are largest, first of equal ones, or -1 at ignored targets.
    """
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    PREDICT: tl.constexpr = predicted_ptr is not None
    classes = units * UNIT
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(lse_ptr + rows + row, 0.0)
        if predicted_ptr is not None:
            tl.store(predicted_ptr + row, -1)
    else:
        begin = _row(row, inner, outer_stride, inner_stride)
        lead = _lead(begin, VECTOR, ALIGNED)
        aligned = logits_ptr + begin // VECTOR * VECTOR
        column = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        nothing = tl.zeros([BLOCK // VECTOR], tl.float32)
        sums = (nothing + float("-inf"), nothing, nothing, nothing + float("-inf"), nothing.to(tl.int32))
        end = lead + classes
        whole = tl.where(lead > 0, BLOCK, 0)
        after = tl.maximum((end // BLOCK) * BLOCK, whole)
        if lead > 0:  # a block of which the row has only a part
            known = (column >= lead) & (column < end)
            x = tl.load(aligned + column, mask=known, other=float("-inf")).to(tl.float32)
            sums = _seen(x, column - lead, known, classes, sums, weight_ptr, cap, True, SMOOTH, CAPPED, PREDICT)
        for first in range(whole, after, BLOCK):
            x = tl.load(aligned + first + column).to(tl.float32)
            sums = _seen(x, first + column - lead, True, classes, sums, weight_ptr, cap, False, SMOOTH, CAPPED, PREDICT)
        for first in range(after, end, BLOCK):
            known = first + column < end
            x = tl.load(aligned + first + column, mask=known, other=float("-inf")).to(tl.float32)
            sums = _seen(x, first + column - lead, known, classes, sums, weight_ptr, cap, True, SMOOTH, CAPPED, PREDICT)
        most, total, plain, largest, place = sums
        most_of_all = tl.max(most, axis=0)
        shift = tl.where(most_of_all == float("-inf"), 0.0, most_of_all)
        log_sum = tl.log(tl.sum(total * exp2((most - shift) * LOG2_E), axis=0))
        inside = (target >= 0) & (target < classes)
        # A target that is no class reads as NaN.
        hit = tl.load(logits_ptr + begin + target, mask=inside, other=float("nan")).to(tl.float32)
        if CAPPED:
            hit = cap * tanh(hit / cap)
        lse = most_of_all + log_sum
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + target, mask=inside, other=float("nan"))
            loss = (1.0 - label_smoothing) * weight * ((most_of_all - hit) + log_sum)
            if SMOOTH:
                mean = tl.load(weight_mean_ptr)
                loss += label_smoothing * ((mean * most_of_all - tl.sum(plain, axis=0) / classes) + mean * log_sum)
        else:
            loss = (1.0 - label_smoothing) * (most_of_all - hit) + log_sum
            if SMOOTH:
                loss += label_smoothing * (most_of_all - tl.sum(plain, axis=0) / classes)
        loss += z_loss * lse * lse
        if predicted_ptr is not None:
            largest_of_all = tl.max(largest, axis=0)
            tl.store(predicted_ptr + row, tl.min(tl.where(largest == largest_of_all, place, classes), axis=0))
        tl.store(loss_ptr + row, loss)
        tl.store(lse_ptr + row, most_of_all)
        tl.store(lse_ptr + rows + row, log_sum)


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_finalise(
    rows_loss_ptr, target_ptr, loss_ptr, count_ptr,   # [rows], [rows], 0-d, [2] or None
    lse_ptr, weight_ptr,                              # [2, rows], [classes] or None
    rows, classes, ignore_index, z_loss, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum over rows, or their mean if count_ptr is given; one program, in a fixed order.

    With weights that is the rows' over the sum of their weights, and z lse^2, which they lack, over their number.
    """
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for first in range(0, rows, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < rows
        total += tl.load(rows_loss_ptr + offs, mask=mask, other=0.0)
        target = tl.load(target_ptr + offs, mask=mask, other=0)
        known = mask & (target != ignore_index)
        count += tl.where(known, 1.0, 0.0)
        if weight_ptr is not None:
            inside = known & (target >= 0) & (target < classes)
            weight += tl.where(known, tl.load(weight_ptr + target, mask=inside, other=float("nan")), 0.0)
            lse = tl.load(lse_ptr + offs, mask=mask, other=0.0) + tl.load(lse_ptr + rows + offs, mask=mask, other=0.0)
            square += lse * lse
    loss = tl.sum(total, axis=0)
    if count_ptr is not None:
        counted = tl.sum(count, axis=0)
        if weight_ptr is not None:
            weights = tl.sum(weight, axis=0)
            loss = loss / weights + z_loss * tl.sum(square, axis=0) / counted
            tl.store(count_ptr, weights)
        else:
            loss = tl.where(counted > 0.0, loss / tl.maximum(counted, 1.0), float("nan"))
            tl.store(count_ptr, counted)
        tl.store(count_ptr + 1, counted)
    tl.store(loss_ptr, loss)


@triton.jit
def _slope(x, scale, most, log_sum, share, of_target, cap, CAPPED: tl.constexpr):
    """scale exp(x - lse) - share - of_target, by the logits that are capped."""
    if CAPPED:
        y = tanh(x / cap)
        x = cap * y
    grad = scale * exp2((x - most) * LOG2_E - log_sum * LOG2_E) - share - of_target
    if CAPPED:
        grad *= 1.0 - y * y
    return grad


@triton.jit(do_not_specialize=["ignore_index", "rows", "units"])
def _cross_entropy_backward(
    grad_loss_ptr, logits_ptr, target_ptr, lse_ptr, count_ptr,  # [rows] or 0-d, ..., [2, rows], [2] or None
    weight_ptr, weight_mean_ptr,                                # [classes], their mean; may be None
    grad_ptr,                                                   # [rows, classes]; may be logits_ptr
    grad_loss_stride, rows, units, splits, inner, outer_stride, inner_stride,  # classes = units * UNIT
    grad_inner, grad_outer_stride, grad_inner_stride, ignore_index, label_smoothing, z_loss, cap,
    CAPPED: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = g ((1 + 2 z lse) exp(x - lse) - e / V - (1 - e) onehot(target)); a program has STEPS blocks of a row.

    With weights: g ((1 - e) w[target] + e mean(w)) exp(x - lse), e w / V, (1 - e) w[target] for its terms, and z's over
    the number of rows. CAPPED: that by cap tanh(logits / cap), times its derivative.
    """
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
    by_rows = g
    if count_ptr is not None:
        g = g / tl.load(count_ptr)
        by_rows = by_rows / tl.load(count_ptr + 1) if weight_ptr is not None else g
    known = (target >= 0) & (target < classes)
    g = tl.where(known, g, float("nan"))
    of_target = g * (1.0 - label_smoothing)
    everywhere = g * (label_smoothing / classes)
    if weight_ptr is not None:
        of_target *= tl.load(weight_ptr + target, mask=known, other=float("nan"))
        scale = of_target + g * label_smoothing * tl.load(weight_mean_ptr) + by_rows * (2.0 * z_loss * (most + log_sum))
    else:
        scale = g * (1.0 + 2.0 * z_loss * (most + log_sum))
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
                share = everywhere
                if weight_ptr is not None:
                    share *= tl.load(weight_ptr + (offs - lead))
                grad = _slope(x, scale, most, log_sum, share, 0.0, cap, CAPPED)
                tl.store(aligned_out + offs, grad.to(grad_ptr.dtype.element_ty))
        else:
            mask = (offs >= lead) & (offs < lead + classes)
            x = tl.load(aligned + offs, mask=mask & (target != ignore_index), other=0.0).to(tl.float32)
            share = everywhere
            if weight_ptr is not None:
                share *= tl.load(weight_ptr + (offs - lead), mask=mask, other=0.0)
            grad = _slope(x, scale, most, log_sum, share, tl.where(offs == hit, of_target, 0.0), cap, CAPPED)
            grad = tl.where(ignored, 0.0, grad)
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


def cross_entropy(
    logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction, predict
):  # fmt: skip
    require_targets(logits, target)
    x, layout = as_rows(logits)
    t, weights = target.contiguous(), weights_of(class_weight, logits)
    rows, classes = t.numel(), logits.size(-1)
    of_row = logits.new_empty(target.shape, dtype=torch.float32)
    lse = logits.new_empty((2, rows), dtype=torch.float32)
    count = logits.new_empty(2 if reduction == "mean" else 0, dtype=torch.float32)
    predicted = t.new_empty(target.shape if predict else 0)
    smooth = label_smoothing != 0.0
    if rows:
        constants, width = _vectors(classes, x.dtype, layout)
        chosen = _tile("forward", logits, rows, width, BLOCK_FORWARD)
        _cross_entropy_forward[(rows,)](
            x, t, of_row, lse, weights, _mean(weights, smooth), predicted if predict else None, rows,
            classes // constants["UNIT"], *layout, ignore_index, label_smoothing,
            0.0 if weights is not None and reduction == "mean" else z_loss, softcap, SMOOTH=smooth,
            CAPPED=softcap != 0.0, **constants, **chosen,
        )  # fmt: skip
    if reduction == "none":
        return of_row, lse, count, predicted
    loss = logits.new_empty((), dtype=torch.float32)
    block, warps = _block(rows, FINALISE)
    mean = reduction == "mean"
    _cross_entropy_finalise[(1,)](
        of_row, t, loss, count if mean else None, lse, weights if mean else None, rows, logits.size(-1), ignore_index,
        z_loss, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return loss, lse, count, predicted


def _mean(weights, wanted):
    """0-d, of the classes' weights; None where that is not asked for."""
    return weights.sum() * (1.0 / weights.numel()) if wanted and weights is not None else None


def cross_entropy_backward(
    grad_loss, logits, target, lse, count, class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction,
    inplace=False,
):  # fmt: skip
    """In place: written over the logits, which must be `writable`."""
    require_targets(logits, target)
    require_saved(logits, lse, count, reduction)
    g, g_stride = upstream(grad_loss, target, reduction, class_weight)
    x, layout = as_rows(logits)
    t, weights = target.contiguous(), weights_of(class_weight, logits)
    rows, classes = t.numel(), logits.size(-1)
    grad = logits if inplace else dense_like(logits)
    if rows:
        of_grad = layout if inplace else dense_layout(rows, classes)
        constants, width = _vectors(classes, x.dtype, layout, of_grad)
        chosen = _tile("backward", logits, rows, width, BLOCK_BACKWARD)
        steps = min(next_power_of_2(ceil_div(width, chosen["BLOCK"])), STEPS)
        splits = ceil_div(width, steps * chosen["BLOCK"])
        _cross_entropy_backward[(rows * splits,)](
            g, x, t, lse, count if reduction == "mean" else None, weights, _mean(weights, True), grad, g_stride, rows,
            classes // constants["UNIT"], splits, *layout, *of_grad, ignore_index, label_smoothing, z_loss, softcap,
            CAPPED=softcap != 0.0, STEPS=steps, **constants, **chosen,
        )  # fmt: skip
    return grad


linear_cross_entropy = over_chunks(cross_entropy, cross_entropy_backward)
