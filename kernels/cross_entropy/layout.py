"""Logits [..., V] as rows that kernels find by address, targets and gradients beside them."""

from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """Row r begins at element r // inner * outer_stride + r % inner * inner_stride; a row is dense."""

    inner: int
    outer_stride: int
    inner_stride: int


def as_rows(logits: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """Logits whose rows a Layout finds; copies only where the classes do not lie dense, or three strides differ.

    logits[:, :-1] of [B, T, V], the usual way to predict the next token, is not copied. Keep the tensor alive while
    its data_ptr is in use.
    """
    classes = logits.size(-1)
    x = logits
    if classes > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() > 3:
        x = x.flatten(0, -3)
    if x.dim() == 3 and not x.is_contiguous():
        return x, Layout(max(x.size(1), 1), x.stride(0), x.stride(1))
    if x.dim() == 1:
        x = x.unsqueeze(0)
    rows = x.numel() // classes
    return x, Layout(max(rows, 1), 0, classes if x.is_contiguous() else x.stride(0))


def dense_layout(rows: int, classes: int) -> Layout:
    """That of memory which `dense_like` gives."""
    return Layout(max(rows, 1), 0, classes)


def writable(logits: torch.Tensor) -> bool:
    """Whether as_rows gives the memory itself and no two rows share any of it, so that a kernel may write there."""
    x, (inner, outer_stride, inner_stride) = as_rows(logits)
    rows, classes = x.numel() // x.size(-1), x.size(-1)
    apart = inner_stride >= classes or inner == 1
    blocks_apart = outer_stride >= (inner - 1) * inner_stride + classes or rows <= inner
    return x.data_ptr() == logits.data_ptr() and apart and blocks_apart


def require_targets(logits: torch.Tensor, target: torch.Tensor) -> None:
    """Raise unless there is one int64 for each row of logits, on its device: kernels read by address."""
    if target.dtype is not torch.int64 or target.shape != logits.shape[:-1] or target.device != logits.device:
        raise ValueError(
            f"genai_fast: expected targets of int64 {tuple(logits.shape[:-1])} on {logits.device},"
            f" got {target.dtype} {tuple(target.shape)} on {target.device}"
        )
    if not logits.size(-1):
        raise ValueError(f"genai_fast: expected logits of at least one class, got {tuple(logits.shape)}")


def require_saved(logits: torch.Tensor, lse: torch.Tensor, count: torch.Tensor, reduction: str) -> None:
    """Raise unless these are what forward gave for such logits."""
    rows = logits.numel() // logits.size(-1)
    for x, numbers in ((lse, 2 * rows), (count, 2 if reduction == "mean" else 0)):
        right = x.dtype is torch.float32 and x.device == logits.device and x.is_contiguous()
        if not right or x.numel() != numbers:
            raise ValueError(
                f"genai_fast: expected {int(numbers)} float32 on {logits.device} as forward gave, got {x.dtype}"
                f" {tuple(x.shape)} on {x.device}"
            )


def weights_of(class_weight: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor | None:
    """The classes' weights side by side. Raises ValueError: not one float32 for each class, on the logits' device."""
    if class_weight is None:
        return None
    x = class_weight
    if x.shape != logits.shape[-1:] or x.dtype is not torch.float32 or x.device != logits.device:
        raise ValueError(
            f"genai_fast: expected class weights of float32 {tuple(logits.shape[-1:])} on {logits.device},"
            f" got {x.dtype} {tuple(x.shape)} on {x.device}"
        )
    return x.contiguous()


def upstream(
    grad_loss: torch.Tensor, target: torch.Tensor, reduction: str, class_weight: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """The gradient of the loss in float32, and its stride from row to row: 0 for a single value.

    Raises ValueError: it is not one value, or one for each target, on their device. Rows of a chunk that are divided
    by a mean's two denominators (linear.py) have one each.
    """
    rows = reduction == "none" or (class_weight is not None and grad_loss.dim() > 0)
    shape = tuple(target.shape) if rows else ()
    if tuple(grad_loss.shape) != shape or grad_loss.device != target.device:
        raise ValueError(
            f"genai_fast: expected a gradient {shape} on {target.device} as the loss has,"
            f" got {tuple(grad_loss.shape)} on {grad_loss.device}"
        )
    g = grad_loss.float()
    if not g.dim():
        return g, 0
    if g.dim() == 1:
        return g, g.stride(0)
    if all(stride == 0 or size == 1 for stride, size in zip(g.stride(), g.shape, strict=True)):
        return g, 0
    return g.contiguous(), 1
