"""One Adam step over all tensors of a model, in one call."""

import math
from collections.abc import Sequence

import torch

from genai_fast.backends import forced_backend, is_plain
from genai_fast.ops import checks
from genai_fast.ops.dispatch import library_call, observed

_OP = "adam_step"
_SMALLEST = 1.2e-38  # the kernel counts smaller numbers as zero


def flushed(eps: float, beta2: float) -> bool:
    """Whether second moments that the kernel counts as zero are not small beside eps^2: a step would differ by 1e-4."""
    return eps * eps * (1.0 - beta2) < 1e4 * _SMALLEST


def share_memory(written: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Whether one of these tensors is there twice: the kernel updates all at once."""
    addresses = [x.data_ptr() for tensors in written for x in tensors if x.numel()]
    return len(set(addresses)) < len(addresses)


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
        steps: steps taken so far, one 0-d tensor for each parameter, of params' dtype and device; updated in place.
            No two of all the tensors that are updated, nor a gradient and one of them, share memory.
        lr, betas, eps, weight_decay: as torch.optim.Adam takes them: at least 0, betas less than 1.
        decoupled: AdamW's decay p *= 1 - lr weight_decay instead of g += weight_decay p.

    Returns: The updated params, exp_avgs, exp_avg_sqs and steps, one list.
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
            checks.is_floating(_OP, f"{name}[{k}]", x)
            checks.is_floating(_OP, f"params[{k}]", p)
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
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{_OP}: betas: expected two numbers in [0, 1), got {betas!r}")
    below_1 = math.nextafter(1.0, 0.0)
    beta1, beta2 = (checks.real(_OP, "betas", b, "numbers in [0, 1)", 0.0, below_1) for b in betas)
    rates = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    lr, eps, decay = (checks.real(_OP, name, x, "a finite float >= 0", 0.0) for name, x in rates.items())
    written = (params, exp_avgs, exp_avg_sqs, steps)
    if not observed() and all(is_plain(x) for tensors in (*written, grads) for x in tensors):
        addresses = {x.data_ptr() for tensors in written for x in tensors if x.numel()}
        if share_memory(written) or any(g.data_ptr() in addresses for g in grads if g.numel()):
            raise ValueError(
                f"{_OP}: params: expected parameters, moments and steps in memory of their own, got one tensor twice;"
                f" pass each parameter once, with moments, a step count and a gradient of its own"
            )
    backend = forced_backend() or ("reference" if flushed(eps, beta2) else "")
    settings = (lr, beta1, beta2, eps, decay, checks.flag(_OP, "decoupled", decoupled))
    with torch.no_grad():
        library_call(_OP, *map(list, (params, grads, exp_avgs, exp_avg_sqs, steps)), *settings, backend)
    return [*params, *exp_avgs, *exp_avg_sqs, *steps]
