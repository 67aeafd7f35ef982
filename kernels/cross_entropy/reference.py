"""cross_entropy in plain PyTorch: the definition, the fallback and the second derivatives."""

import torch

from genai_fast.kernels.cross_entropy.linear import over_chunks
from genai_fast.kernels.cross_entropy.targets import capped, count_of, targets_of, wide


def cross_entropy(
    logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction, predict
):  # fmt: skip
    """(loss, (max, ln sum exp(x - max)) by row, what a mean divides by, predicted): see `cross_entropy` in ops."""
    classes = logits.size(-1)
    given = wide(logits).reshape(-1, classes)
    x = capped(given, softcap)
    t, counted, missing = targets_of(target, classes, ignore_index)
    m = x.amax(-1)
    log_sum = (x - m[:, None]).exp().sum(-1).log()
    smooth, hit = label_smoothing, x.gather(-1, t[:, None])[:, 0]
    if class_weight is None:
        loss = (1.0 - smooth) * (m - hit) + log_sum
        if smooth:
            loss = loss + smooth * (m - x.mean(-1))
    else:
        loss = (1.0 - smooth) * class_weight[t] * (m - hit + log_sum)
        if smooth:
            mean = class_weight.mean()
            loss = loss + smooth * (mean * m - (x * class_weight).mean(-1) + mean * log_sum)
    penalty = z_loss * (m + log_sum) ** 2
    count = count_of(target, class_weight, ignore_index, x.dtype, reduction)
    if z_loss:
        share = count[0] / count[1] if reduction == "mean" and class_weight is not None else 1.0
        loss = loss + penalty * share
    loss = loss.masked_fill(missing, float("nan")).masked_fill(~counted, 0.0)
    if reduction == "none":
        loss = loss.view(target.shape)
    else:
        loss = loss.sum() if reduction == "sum" else loss.sum() / count[0]
    m, log_sum = (s.masked_fill(~counted, 0.0) for s in (m, log_sum))
    predicted = t.new_empty(0)
    if predict:
        place = given.masked_fill(given.isnan(), -torch.inf).argmax(-1)
        predicted = place.masked_fill(~counted, -1).view(target.shape)
    return loss, torch.stack((m, log_sum)), count, predicted


def cross_entropy_backward(
    grad_loss, logits, target, lse, count, class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction,
    inplace=False,
):  # fmt: skip
    """dx = g ((1 + 2 z lse) softmax(x) - e / V - (1 - e) onehot(target)), with g = 0 where the target is ignored.

    With weights w: (1 - e) w[target] + e mean(w) for 1, e w / V, (1 - e) w[target]. A cap's derivative is a factor.
    lse is found again, so that the formula can be differentiated by the logits. In place: written over the logits.
    """
    classes = logits.size(-1)
    x = capped(wide(logits).reshape(-1, classes), softcap)
    t, counted, missing = targets_of(target, classes, ignore_index)
    g = grad_loss.to(x.dtype).expand(target.shape).reshape(-1)
    by_rows = g / count[1] if reduction == "mean" else g
    g = g / count[0] if reduction == "mean" else g
    g = g.masked_fill(missing, float("nan"))
    smooth, kept, total, share = label_smoothing, 1.0 - label_smoothing, 1.0, label_smoothing / classes
    if class_weight is not None:
        kept = kept * class_weight[t]
        total, share = (kept + smooth * class_weight.mean())[:, None], share * class_weight
    probability = torch.softmax(x, -1)
    grad = g[:, None] * (total * probability)
    if z_loss:
        grad = grad + (by_rows * 2.0 * z_loss * torch.logsumexp(x, -1))[:, None] * probability
    if smooth:
        grad = grad - g[:, None] * share
    grad = grad.scatter_add(-1, t[:, None], (-g * kept)[:, None])
    if softcap:
        grad = grad * (1.0 - (x / softcap) ** 2)
    grad = grad.masked_fill(~counted[:, None], 0.0).view(logits.shape).to(logits.dtype)
    return logits.copy_(grad) if inplace else grad


linear_cross_entropy = over_chunks(cross_entropy, cross_entropy_backward)
