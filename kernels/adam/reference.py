"""adam_step in plain PyTorch, out of place: the definition and the truth of the numerics gate."""

import math


def updated(params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled):
    """New (params, exp_avgs, exp_avg_sqs, steps)."""
    results = ([], [], [], [])
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step = step + 1
        if decoupled:
            p = p * (1.0 - lr * weight_decay)
        else:
            g = g + weight_decay * p
        m = m + (1.0 - beta1) * (g - m)
        v = beta2 * v + (1.0 - beta2) * g * g
        denominator = v.sqrt() / math.sqrt(1.0 - beta2 ** float(step)) + eps
        p = p - lr / (1.0 - beta1 ** float(step)) * m / denominator
        for result, value in zip(results, (p, m, v, step), strict=True):
            result.append(value)
    return results


def adam_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled):
    new = updated(params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled)
    for old, values in zip((params, exp_avgs, exp_avg_sqs, steps), new, strict=True):
        for x, value in zip(old, values, strict=True):
            x.copy_(value)
