"""The stage "large": in tensors of more than 2^31 elements the last rows come out as those rows alone do.

A 32-bit index that overflows reads or writes elsewhere, so that the last rows are wrong, forward or backward. An op
takes up to 35 GB of device memory.
"""

from collections.abc import Callable
from typing import Any

import torch

from genai_fast import ops

ELEMENTS = (1 << 31) + (1 << 24)
_TAIL = 3  # rows that are compared

Op = Callable[[torch.Tensor, int], torch.Tensor]  # of rows [R, ...] and the number of the first of them


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    c = torch.arange(x.size(1), device=x.device, dtype=torch.float32)
    return c.sin(), c.cos() + 1.5


def _rotary(x: torch.Tensor, first: int) -> torch.Tensor:
    angles = torch.arange(x.size(2), device=x.device)[:, None] * torch.linspace(0, 1, x.size(3) // 2, device=x.device)
    return ops.rotary(x, angles.cos(), angles.sin())


def _cross_entropy(x: torch.Tensor, first: int) -> torch.Tensor:
    targets = torch.arange(first, first + len(x), device=x.device) % x.size(1)
    return ops.cross_entropy(x, targets, reduction="none")


def _sample(x: torch.Tensor, first: int) -> torch.Tensor:
    return ops.reparameterize(x, x * 0.1, seed=3, offset=first * x[0].numel())


# The shape of a row, and what is made of rows.
LARGE: dict[str, tuple[tuple[int, ...], Op]] = {
    "reparameterize": ((4096,), _sample),
    "batch_norm_act": (
        (64, 32, 32),
        lambda x, first: ops.batch_norm_act(x, None, None, *_statistics(x), training=False),
    ),
    "bias_act": ((64, 32, 32), lambda x, first: ops.bias_act(x, _statistics(x)[0].to(x.dtype))),
    "act_dropout": ((4096,), lambda x, first: ops.act_dropout(x, 0.3, seed=3, offset=first * x[0].numel())),
    "layer_norm": ((1024,), lambda x, first: ops.layer_norm(x)),
    "rms_norm": ((1024,), lambda x, first: ops.rms_norm(x)),
    "gated_act": ((2048,), lambda x, first: ops.gated_act(x)),
    "cross_entropy": ((50257,), _cross_entropy),
    "rotary": ((4, 128, 64), _rotary),
    "causal_attention": ((4, 128, 64), lambda x, first: ops.causal_attention(x, x, x)),
}


def wrong(name: str, device: str, elements: int = ELEMENTS, dtype: torch.dtype = torch.bfloat16) -> str:
    """What is wrong with an op's last rows; "" if nothing."""
    shape, op = LARGE[name]
    rows = max(elements // torch.Size(shape).numel(), _TAIL) + 1
    # A row that is drawn once, and a factor a row: drawing them all would take as long as the check.
    row = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    factors = torch.linspace(0.5, 1.5, rows, device=device).view(-1, *(1 for _ in shape)).to(dtype)
    x = (row * factors).requires_grad_()
    tail = x.detach()[-_TAIL:].clone().requires_grad_()
    # Copies of the tails: a slice would hold all of a tensor while the next is made.
    whole, alone = (
        (y.detach()[-_TAIL:].clone(), torch.autograd.grad(y, inputs, torch.ones_like(y))[0][-_TAIL:].clone())
        for y, inputs in ((op(x, 0), x), (op(tail, rows - _TAIL), tail))
    )
    for what, a, b in zip(("output", "gradient"), whole, alone, strict=True):
        if not bool(torch.isfinite(b).all()):
            return f"{what}: numbers that are not finite"
        if not torch.equal(a, b):
            return f"{what}: the last {_TAIL} of {rows} rows differ from those rows alone, at {x.numel()} elements"
    return ""


def work(name: str, device: str, elements: int = ELEMENTS) -> dict[str, Any]:
    message = wrong(name, device, elements)
    return {"failures": {"large": message} if message else {}}
