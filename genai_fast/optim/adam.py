"""torch.optim.Adam and AdamW whose step on CPU float32 parameters is one call of the fused kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from genai_fast.ops import adam_step


def _fits(group: dict[str, Any], params: list[torch.Tensor]) -> bool:
    if group["amsgrad"] or group["maximize"] or group["differentiable"] or isinstance(group["lr"], torch.Tensor):
        return False
    return all(
        x.dtype is torch.float32 and x.device.type == "cpu" and x.layout is torch.strided and x.is_contiguous()
        for p in params
        for x in (p, p.grad)
    )


class _OneCall:
    """Replaces `step` where the kernel fits; everything else (CUDA, amsgrad, sparse gradients) stays torch's."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        if all(_fits(group, params) for group, params in work):
            for group, params in work:
                self._step_group(group, params)
        else:
            # torch wraps `step` of each class that is instantiated, to run hooks: ours has run them already.
            inherited = super().step.__func__
            if getattr(inherited, "hooked", False):
                inherited = inherited.__wrapped__
            inherited(self)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        by_step: dict[float, list[torch.Tensor]] = {}
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            by_step.setdefault(state["step"].item(), []).append(p)
        for step, members in by_step.items():
            states = [self.state[p] for p in members]
            torch._foreach_add_([s["step"] for s in states], 1.0)
            adam_step(
                members, [p.grad for p in members], [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states], step=int(step) + 1, lr=group["lr"], betas=group["betas"],
                eps=group["eps"], weight_decay=group["weight_decay"],
                decoupled=group.get("decoupled_weight_decay", False),
            )  # fmt: skip


class Adam(_OneCall, torch.optim.Adam):
    """torch.optim.Adam: same arguments, same state_dict; on CPU float32 parameters one fused call a step."""


class AdamW(_OneCall, torch.optim.AdamW):
    """torch.optim.AdamW: same arguments, same state_dict; on CPU float32 parameters one fused call a step."""
