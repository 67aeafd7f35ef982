"""cross_entropy on the CPU: allocates the results and calls cpu_kernel.cpp."""

import torch

from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address, dense_like
from genai_fast.kernels.cross_entropy.layout import (
    as_rows,
    dense_layout,
    require_saved,
    require_targets,
    upstream,
    weights_of,
)
from genai_fast.kernels.cross_entropy.linear import over_chunks

_REDUCTION_CODE = {"none": 0, "sum": 1, "mean": 2}


def cross_entropy(
    logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction, predict
):  # fmt: skip
    require_targets(logits, target)
    x, layout = as_rows(logits)
    t, weights = target.contiguous(), weights_of(class_weight, logits)
    rows = t.numel()
    loss = logits.new_empty(target.shape if reduction == "none" else (), dtype=torch.float32)
    lse = logits.new_empty((2, rows), dtype=torch.float32)
    count = logits.new_empty(2 if reduction == "mean" else 0, dtype=torch.float32)
    predicted = t.new_empty(target.shape if predict else 0)
    cpp.cross_entropy(
        address(x), DTYPE_CODE[x.dtype], *layout, address(t), address(weights), address(loss), address(lse),
        address(count) if reduction == "mean" else 0, address(predicted) if predict else 0, rows, logits.size(-1),
        ignore_index, label_smoothing, z_loss, softcap, _REDUCTION_CODE[reduction]
    )  # fmt: skip
    return loss, lse, count, predicted


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
    cpp.cross_entropy_backward(
        address(g), g_stride, address(x), DTYPE_CODE[x.dtype], *layout, address(t), address(lse),
        address(count) if reduction == "mean" else 0, address(weights), address(grad),
        *(layout if inplace else dense_layout(rows, classes)), rows, classes, ignore_index, label_smoothing, z_loss,
        softcap
    )  # fmt: skip
    return grad


linear_cross_entropy = over_chunks(cross_entropy, cross_entropy_backward)
