"""cross_entropy on the GPU: a program reads a row once, forward; backward's programs share the row's columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common.activations_triton import tanh
from genai_fast.kernels.common.launch import ceil_div, next_power_of_2
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
BLOCK_BACKWARD = 2048
A_THREAD = 16  # columns
FINALISE = 2048


@triton.jit
def _row(row, inner, outer_stride, inner_stride):
    """Where a row begins; rows * classes passes 2**31."""
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_forward(
    logits_ptr, target_ptr, loss_ptr, lse_ptr,   # [rows, classes], [rows], [rows], [2, rows]
    weight_ptr, weight_mean_ptr, predicted_ptr,  # [classes], their mean if SMOOTH, [rows]; each may be None
    rows, classes, inner, outer_stride, inner_stride, ignore_index, label_smoothing, z_loss, cap,
    SMOOTH: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w[target] (1 - e) (lse - x[target]) + e mean(w (lse - x)) + z lse^2, x = cap tanh(logits / cap) if CAPPED.

    One program a row. Predicted is where the logits are largest, first of equal ones, or -1 at ignored targets.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(lse_ptr + rows + row, 0.0)
        if predicted_ptr is not None:
            tl.store(predicted_ptr + row, -1)
    else:
        begin = logits_ptr + _row(row, inner, outer_stride, inner_stride)
        most = tl.full((), float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        plain = tl.zeros([BLOCK], tl.float32)
        largest = tl.full((), float("-inf"), tl.float32)
        place = tl.zeros((), tl.int32)
        for first in range(0, classes, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            x = tl.load(begin + offs, mask=offs < classes, other=float("-inf")).to(tl.float32)
            if predicted_ptr is not None:
                here = tl.max(x, axis=0)
                at = tl.min(tl.where(x == here, offs, classes), axis=0)
                place = tl.where(here > largest, at, place)
                largest = tl.maximum(largest, here)
            if CAPPED:
                x = tl.where(offs < classes, cap * tanh(x / cap), float("-inf"))
            now = tl.maximum(most, tl.max(x, axis=0))
            # Nothing but -inf and NaN so far: any finite number serves, and NaN stays.
            shift = tl.where(now == float("-inf"), 0.0, now)
            total = total * tl.where(most == now, 1.0, tl.exp(most - now)) + tl.exp(x - shift)
            if SMOOTH:
                known = tl.where(offs < classes, x, 0.0)
                if weight_ptr is not None:
                    known *= tl.load(weight_ptr + offs, mask=offs < classes, other=0.0)
                plain += known
            most = now
        log_sum = tl.log(tl.sum(total, axis=0))
        inside = (target >= 0) & (target < classes)
        # A target that is no class reads as NaN.
        hit = tl.load(begin + target, mask=inside, other=float("nan")).to(tl.float32)
        if CAPPED:
            hit = cap * tanh(hit / cap)
        lse = most + log_sum
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + target, mask=inside, other=float("nan"))
            loss = (1.0 - label_smoothing) * weight * ((most - hit) + log_sum)
            if SMOOTH:
                mean = tl.load(weight_mean_ptr)
                loss += label_smoothing * ((mean * most - tl.sum(plain, axis=0) / classes) + mean * log_sum)
        else:
            loss = (1.0 - label_smoothing) * (most - hit) + log_sum
            if SMOOTH:
                loss += label_smoothing * (most - tl.sum(plain, axis=0) / classes)
        loss += z_loss * lse * lse
        if predicted_ptr is not None:
            tl.store(predicted_ptr + row, place)
        tl.store(loss_ptr + row, loss)
        tl.store(lse_ptr + row, most)
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


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_backward(
    grad_loss_ptr, logits_ptr, target_ptr, lse_ptr, count_ptr,  # [rows] or 0-d, ..., [2, rows], [2] or None
    weight_ptr, weight_mean_ptr,                                # [classes], their mean; may be None
    grad_ptr,                                                   # [rows, classes]; may be logits_ptr
    grad_loss_stride, rows, classes, splits, inner, outer_stride, inner_stride,
    grad_inner, grad_outer_stride, grad_inner_stride, ignore_index, label_smoothing, z_loss, cap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = g ((1 + 2 z lse) exp(x - lse) - e / V - (1 - e) onehot(target)); one program a block of a row.

    With weights: g ((1 - e) w[target] + e mean(w)) exp(x - lse), e w / V, (1 - e) w[target] for its terms, and z's over
    the number of rows. CAPPED: that by cap tanh(logits / cap), times its derivative.
    """
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    offs = split * BLOCK + tl.arange(0, BLOCK)
    mask = offs < classes
    out = grad_ptr + _row(row, grad_inner, grad_outer_stride, grad_inner_stride) + offs
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(out, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=mask)
    else:
        most = tl.load(lse_ptr + row)
        log_sum = tl.load(lse_ptr + rows + row)
        g = tl.load(grad_loss_ptr + row * grad_loss_stride)
        by_rows = g
        if count_ptr is not None:
            g = g / tl.load(count_ptr)
            by_rows = by_rows / tl.load(count_ptr + 1) if weight_ptr is not None else g
        inside = (target >= 0) & (target < classes)
        g = tl.where(inside, g, float("nan"))
        begin = logits_ptr + _row(row, inner, outer_stride, inner_stride)
        x = tl.load(begin + offs, mask=mask, other=0.0).to(tl.float32)
        if CAPPED:
            slope = tanh(x / cap)
            x = cap * slope
            slope = 1.0 - slope * slope
        if weight_ptr is not None:
            of_target = (1.0 - label_smoothing) * tl.load(weight_ptr + target, mask=inside, other=float("nan"))
            share = tl.load(weight_ptr + offs, mask=mask, other=0.0) * (label_smoothing / classes)
            of_lse = g * (of_target + label_smoothing * tl.load(weight_mean_ptr))
            grad = (of_lse + by_rows * (2.0 * z_loss * (most + log_sum))) * tl.exp((x - most) - log_sum)
            grad -= g * tl.where(offs == target, of_target, 0.0) + g * share
        else:
            grad = g * (1.0 + 2.0 * z_loss * (most + log_sum)) * tl.exp((x - most) - log_sum)
            grad -= g * tl.where(offs == target, 1.0 - label_smoothing, 0.0) + g * (label_smoothing / classes)
        if CAPPED:
            grad *= slope
        tl.store(out, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def _block(columns, most):
    """(BLOCK, num_warps)"""
    block = min(next_power_of_2(columns), most)
    return block, min(max(block // (32 * A_THREAD), 1), 8)


def _tile(name, logits, rows, classes, most):
    block, warps = _block(classes, most)
    chosen = launch(f"cross_entropy/{name}", logits, (rows, classes), BLOCK=block, num_warps=warps)
    return chosen | {"BLOCK": min(chosen["BLOCK"], next_power_of_2(classes))}


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
        chosen = _tile("forward", logits, rows, classes, BLOCK_FORWARD)
        _cross_entropy_forward[(rows,)](
            x, t, of_row, lse, weights, _mean(weights, smooth), predicted if predict else None, rows, classes, *layout,
            ignore_index, label_smoothing, 0.0 if weights is not None and reduction == "mean" else z_loss, softcap,
            SMOOTH=smooth, CAPPED=softcap != 0.0, **chosen,
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
        chosen = _tile("backward", logits, rows, classes, BLOCK_BACKWARD)
        splits = ceil_div(classes, chosen["BLOCK"])
        _cross_entropy_backward[(rows * splits,)](
            g, x, t, lse, count if reduction == "mean" else None, weights, _mean(weights, True), grad, g_stride, rows,
            classes, splits, *layout, *(layout if inplace else dense_layout(rows, classes)), ignore_index,
            label_smoothing, z_loss, softcap, CAPPED=softcap != 0.0, **chosen,
        )  # fmt: skip
    return grad


linear_cross_entropy = over_chunks(cross_entropy, cross_entropy_backward)
