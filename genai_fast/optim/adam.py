"""torch.optim.Adam and AdamW whose step on CPU float32 parameters is one call of the fused kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from genai_fast.backends import forced_backend
from genai_fast.ops._function import library_call


def _fits(x: torch.Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_cpu and x.layout is torch.strided and x.is_contiguous()


class _OneCall:
    """Replaces `step` where the kernel fits; everything else (CUDA, amsgrad, sparse gradients) stays torch's."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [self._tensors(group) for group in self.param_groups]
        if None not in work:
            for group, tensors in zip(self.param_groups, work, strict=True):
                if tensors[0]:
                    library_call(
                        "adam_step", *tensors, group["lr"], *group["betas"], group["eps"], group["weight_decay"],
                        group["decoupled_weight_decay"], forced_backend(),
                    )  # fmt: skip
        else:
            # torch wraps `step` of each class that is instantiated, to run hooks: ours has run them already.
            inherited = super().step.__func__
            if getattr(inherited, "hooked", False):
                inherited = inherited.__wrapped__
            inherited(self)
        return loss

    def _tensors(self, group: dict[str, Any]) -> tuple[list[torch.Tensor], ...] | None:
        """Parameters, gradients, both moments and step counts of a group; None where the kernel does not fit."""
        if group["amsgrad"] or group["maximize"] or group["differentiable"] or isinstance(group["lr"], torch.Tensor):
            return None
        lists: tuple[list[torch.Tensor], ...] = ([], [], [], [], [])
        for p in group["params"]:
            if p.grad is None:
                continue
            if not (_fits(p) and _fits(p.grad)):
                return None
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            members = (p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
            if not all(_fits(x) for x in members[2:]):  # a loaded state may be of another kind
                return None
            for list_, x in zip(lists, members, strict=True):
                list_.append(x)
        return lists


class Adam(_OneCall, torch.optim.Adam):
    """torch.optim.Adam: same arguments, same state_dict; on CPU float32 parameters one fused call a step."""


class AdamW(_OneCall, torch.optim.AdamW):
    """torch.optim.AdamW: same arguments, same state_dict; on CPU float32 parameters one fused call a step."""
