"""A linear layer and its cross-entropy by chunks of rows: the logits of all rows never exist at a time."""

from collections.abc import Callable
from typing import Any

import torch

from genai_fast.kernels.cross_entropy.targets import count_of, probabilities

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # of logits: what keeps the matrix products busy
LEAST_ROWS, TILE_ROWS = 128, 256  # a chunk of many rows is a multiple of a matrix product's tile
ALIGNED = 8  # numbers: rows of logits begin at 16 bytes, which the fast matrix products ask for


def default_chunk(classes: int, itemsize: int, device: str) -> int:
    """Rows a chunk."""
    rows = max(CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (classes * itemsize), LEAST_ROWS)
    return rows - rows % TILE_ROWS if rows > TILE_ROWS else rows


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, total in float32 where a and b are narrower."""
    if total.dtype is a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # no product as large as the weight beside it
    else:
        total += torch.mm(a, b)  # summed in float32 within the product, then rounded once a chunk


def over_chunks(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """linear_cross_entropy of a backend, from its cross_entropy and the gradient of that."""

    def linear_cross_entropy(
        x, weight, bias, target, grad_rows, class_weight, ignore_index, label_smoothing, z_loss, softcap, scaled,
        reduction, predict, chunk, of_x, of_weight, of_bias,
    ):  # fmt: skip
        """(loss, gradients of x, weight and bias, z lse^2 by row, predicted): gradients of the sum over rows, or of
        sum(grad_rows loss). With class weights a mean's parts have two denominators: the sum's z lse^2 is multiplied
        by the first over the second, so that one division makes it the mean.

        What is not asked for is empty. The gradients of weight and bias are float32 or wider.
        """
        rows, columns, classes = x.size(0), x.size(1), weight.size(0)
        if not (
            x.dim() == weight.dim() == 2
            and weight.size(1) == columns
            and target.shape == (rows,)
            and chunk > 0
            and (grad_rows is None or grad_rows.shape == (rows,))
            and (bias is None or bias.shape == (classes,))
        ):
            raise ValueError(
                f"genai_fast: expected x [N, D], weight [V, D], bias [V] and target [N], got {tuple(x.shape)},"
                f" {tuple(weight.shape)}, {None if bias is None else tuple(bias.shape)} and {tuple(target.shape)}"
            )
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if of_x else x.new_empty(0)
        grad_weight = weight.new_zeros(weight.shape if of_weight else 0, dtype=dtype)
        grad_bias = weight.new_zeros(classes if of_bias else 0, dtype=dtype)
        losses, penalty = x.new_empty(rows, dtype=dtype), x.new_empty(rows if z_loss else 0, dtype=dtype)
        predicted = target.new_empty(rows if predict else 0)
        # What a mean divides by; `ratio` is (1, the first over the second) where they differ.
        parts = count_of(target, class_weight, ignore_index, dtype, reduction)
        apart = reduction == "mean" and class_weight is not None and z_loss != 0.0
        ratio = torch.stack((torch.ones_like(parts[0]), parts[1] / parts[0])) if apart else None
        of_loss = (class_weight, ignore_index, label_smoothing, 0.0 if apart else z_loss, softcap, "none", predict)
        of_grad = (class_weight, ignore_index, label_smoothing, z_loss, softcap, "mean" if apart else "none")
        one = x.new_ones((), dtype=dtype) if grad_rows is None else None
        across = weight.t()
        logits = x.new_empty(0)
        for first in range(0, rows, chunk):
            part, t = x[first : first + chunk], target[first : first + chunk]
            # Memory of the first chunk serves all: a fresh piece each time would cost more page faults than the sums.
            if not first:
                logits = x.new_empty(part.size(0), -(-classes // ALIGNED) * ALIGNED)[:, :classes]
            logits = logits[: part.size(0)]
            if bias is None:
                torch.mm(part, across, out=logits)
            else:
                torch.addmm(bias, part, across, out=logits)
            loss, lse, count, places = forward(logits, t, *of_loss)
            factors = probabilities(logits, t, lse, softcap, ignore_index) if scaled else None
            losses[first : first + chunk] = loss if factors is None else loss * factors
            if z_loss:
                square = z_loss * lse.sum(0).square()
                penalty[first : first + chunk] = square if factors is None else square * factors
            if predict:
                predicted[first : first + chunk] = places
            if not (of_x or of_weight or of_bias):
                continue
            g = one.expand(part.size(0)) if grad_rows is None else grad_rows[first : first + chunk]
            g = g if factors is None else g * factors
            grad = backward(g, logits, t, lse, count if ratio is None else ratio, *of_grad, inplace=True)
            if of_x:
                torch.mm(grad, weight, out=grad_x[first : first + chunk])
            if of_weight:
                _add_product(grad_weight, grad.t(), part)
            if of_bias:
                grad_bias += grad.sum(0, dtype=dtype)
        if reduction == "none":
            return losses, grad_x, grad_weight, grad_bias, penalty, predicted
        loss = losses.sum(dtype=torch.float64)
        if reduction == "mean":
            loss = loss / parts[0]
            loss = loss + penalty.sum(dtype=torch.float64) / parts[1] if apart else loss
        return loss.to(dtype), grad_x, grad_weight, grad_bias, penalty, predicted

    return linear_cross_entropy
