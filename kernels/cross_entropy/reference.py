"""cross_entropy in plain PyTorch: the definition, the fallback and the second derivatives."""

import torch

from genai_fast.kernels.cross_entropy.linear import over_chunks


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _targets(target, classes, ignore_index):
    """[rows] each: what to gather by, whether the row counts, and whether it is NaN for want of such a class."""
    t = target.reshape(-1)
    counted = t != ignore_index
    inside = (t >= 0) & (t < classes)
    return t.where(inside, 0), counted, counted & ~inside


def count_of(counted, dtype, reduction):
    """0-d: rows that count, for a mean; else nothing."""
    return counted.sum(dtype=dtype) if reduction == "mean" else counted.new_empty(0, dtype=dtype)


def cross_entropy(logits, target, ignore_index, label_smoothing, z_loss, reduction):
    """(loss, (max, ln sum exp(x - max)) by row, rows that count): see `cross_entropy` in genai_fast.ops."""
    classes = logits.size(-1)
    x = wide(logits).reshape(-1, classes)
    t, counted, missing = _targets(target, classes, ignore_index)
    m = x.amax(-1)
    log_sum = (x - m[:, None]).exp().sum(-1).log()
    smooth = label_smoothing
    loss = (1.0 - smooth) * (m - x.gather(-1, t[:, None])[:, 0]) + log_sum
    if smooth:
        loss = loss + smooth * (m - x.mean(-1))
    if z_loss:
        loss = loss + z_loss * (m + log_sum) ** 2
    loss = loss.masked_fill(missing, float("nan")).masked_fill(~counted, 0.0)
    count = count_of(counted, x.dtype, reduction)
    if reduction == "none":
        loss = loss.view(target.shape)
    elif reduction == "sum":
        loss = loss.sum()
    else:
        loss = loss.sum() / count
    return loss, torch.stack((m, log_sum)), count


def cross_entropy_backward(
    grad_loss, logits, target, lse, count, ignore_index, label_smoothing, z_loss, reduction, inplace=False
):
    """dx = g ((1 + 2 z lse) softmax(x) - e / V - (1 - e) onehot(target)), with g = 0 where the target is ignored.

    lse is found again, so that the formula can be differentiated by the logits. In place: written over the logits.
    """
    classes = logits.size(-1)
    x = wide(logits).reshape(-1, classes)
    t, counted, missing = _targets(target, classes, ignore_index)
    g = grad_loss.to(x.dtype).expand(target.shape).reshape(-1)
    if reduction == "mean":
        g = g / count
    g = g.masked_fill(missing, float("nan"))
    slope = torch.softmax(x, -1)
    if z_loss:
        slope = slope * (1.0 + 2.0 * z_loss * torch.logsumexp(x, -1, keepdim=True))
    if label_smoothing:
        slope = slope - label_smoothing / classes
    hit = torch.full_like(t, 1, dtype=x.dtype).mul(label_smoothing - 1.0)[:, None]
    grad = (g[:, None] * slope.scatter_add(-1, t[:, None], hit)).masked_fill(~counted[:, None], 0.0)
    grad = grad.view(logits.shape).to(logits.dtype)
    return logits.copy_(grad) if inplace else grad


linear_cross_entropy = over_chunks(cross_entropy, cross_entropy_backward)
