"""One Adam step over all tensors of a model, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from genai_fast.backends import forced_backend
from genai_fast.ops.dispatch import library_call

_OP = "adam_step"


def adam_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> list[torch.Tensor]:
    """t += 1;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;  p -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps).

    Args:
        params, exp_avgs, exp_avg_sqs: parameters and both moments, updated in place; contiguous, of one dtype and
            device, shapes in pairs.
        grads: gradients, shapes, dtype and device of params, contiguous.
        steps: steps taken so far, one 0-d tensor for each parameter (not shared), of params' dtype and device;
            updated in place.
        lr, betas, eps, weight_decay: as torch.optim.Adam takes them.
        decoupled: AdamW's decay p *= 1 - lr weight_decay instead of g += weight_decay p.

    Returns:
        The updated params, exp_avgs, exp_avg_sqs and steps, one list.

    Gradients: none.
    Backends: C++ (CPU, float32; numbers below 1.2e-38 count as zero), reference (elsewhere).
        On CUDA torch.optim.Adam(fused=True) is the better choice.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is changed.
    Source: Kingma & Ba 2014, arXiv:1412.6980; Loshchilov & Hutter 2017, arXiv:1711.05101.
    """
    groups = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps, "params": params}
    for name, tensors in groups.items():
        if len(tensors) != len(params):
            raise ValueError(f"{_OP}: {name}: expected {len(params)} tensors as params has, got {len(tensors)}")
        for k, (x, p) in enumerate(zip(tensors, params, strict=True)):
            if x.dtype is not p.dtype or x.device != p.device:
                raise TypeError(
                    f"{_OP}: {name}[{k}]: expected {p.dtype} on {p.device} as params[{k}] has, got {x.dtype} on"
                    f" {x.device}; convert it with .to(params[{k}])"
                )
            shape = () if name == "steps" else tuple(p.shape)
            if tuple(x.shape) != shape:
                raise ValueError(f"{_OP}: {name}[{k}]: expected shape {shape}, got {tuple(x.shape)}")
            if not x.is_contiguous():
                raise ValueError(f"{_OP}: {name}[{k}]: expected a contiguous tensor, got strides {x.stride()}")
    with torch.no_grad():
        library_call(
            _OP, list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps),
            float(lr), *map(float, betas), float(eps), float(weight_decay), decoupled, forced_backend(),
        )  # fmt: skip
    return [*params, *exp_avgs, *exp_avg_sqs, *steps]
