"""adam_step in plain PyTorch, out of place: the definition and the truth of the numerics gate."""

from __future__ import annotations

import math

import torch


def updated(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay, decoupled):
    """New (params, exp_avgs, exp_avg_sqs) after step number `step` (1 is the first)."""
    results = ([], [], [])
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if decoupled:
            p = p * (1.0 - lr * weight_decay)
        else:
            g = g + weight_decay * p
        m = m + (1.0 - beta1) * (g - m)
        v = beta2 * v + (1.0 - beta2) * g * g
        denominator = v.sqrt() / math.sqrt(1.0 - beta2**step) + eps
        p = p - lr / (1.0 - beta1**step) * m / denominator
        for result, value in zip(results, (p, m, v), strict=True):
            result.append(value)
    return results


def adam_step(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay, decoupled):
    new = updated(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay, decoupled)
    for old, values in zip((params, exp_avgs, exp_avg_sqs), new, strict=True):
        torch._foreach_copy_(old, values)
