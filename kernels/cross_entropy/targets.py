"""What each row's target says, and what a cap makes of logits, in plain PyTorch."""

import torch

from genai_fast.kernels.common.channels import wide

__all__ = ["capped", "count_of", "probabilities", "targets_of", "wide"]


def targets_of(target, classes, ignore_index):
    """[rows] each: what to gather by, whether the row counts, and whether it is NaN for want of such a class."""
    t = target.reshape(-1)
    counted = t != ignore_index
    inside = (t >= 0) & (t < classes)
    return t.where(inside, 0), counted, counted & ~inside


def count_of(target, class_weight, ignore_index, dtype, reduction):
    """[2], what a mean divides by: the sum of the weights of rows that count, and their number; or nothing."""
    if reduction != "mean":
        return target.new_empty(0, dtype=dtype)
    counted = (target != ignore_index).reshape(-1)
    number = counted.sum(dtype=dtype)
    if class_weight is None:
        return torch.stack((number, number))
    return torch.stack((torch.where(counted, of_rows(class_weight, target, ignore_index), 0.0).sum(), number))


def of_rows(class_weight, target, ignore_index):
    """[rows]: each target's weight; NaN where it is no class."""
    t, _, missing = targets_of(target, class_weight.numel(), ignore_index)
    return class_weight[t].masked_fill(missing, float("nan"))


def capped(x, softcap):
    return softcap * torch.tanh(x / softcap) if softcap else x


def probabilities(logits, target, lse, softcap, ignore_index):
    """[rows]: softmax of each row at its target, from the lse that forward gave."""
    t, counted, missing = targets_of(target, logits.size(-1), ignore_index)
    hit = capped(wide(logits.gather(-1, t[:, None])[:, 0]), softcap)
    return ((hit - lse[0]) - lse[1]).exp().masked_fill(missing, float("nan")).masked_fill(~counted, 0.0)
