"""torch.optim.Adam and AdamW whose step on CPU float32 parameters is one call of the fused kernel."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from genai_fast.backends import FallbackWarning, forced_backend, survey
from genai_fast.kernels.common.rows import is_dense
from genai_fast.ops.adam import flushed, share_memory
from genai_fast.ops.dispatch import library_call


class _OneCall(torch.optim.Optimizer):
    """Replaces `step` if the kernel fits; everything else (CUDA, amsgrad, sparse gradients) stays torch's."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [self._tensors(group) for group in self.param_groups]
        reason = next((found for found in work if isinstance(found, str)), "")
        if not reason and share_memory([tensors for group in work for tensors in (group[0], *group[2:])]):
            reason = "a parameter is there twice, or shares its memory"
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            reason = "a GradScaler leaves unscaling to an optimizer with fused=True"
        if not reason:
            for group, tensors in zip(self.param_groups, work, strict=True):
                if tensors[0]:
                    library_call(
                        "adam_step", *tensors, float(group["lr"]), *map(float, group["betas"]), float(group["eps"]),
                        float(group["weight_decay"]), group["decoupled_weight_decay"], forced_backend(),
                    )  # fmt: skip
            return loss
        if not self.__dict__.get("_said"):
            self._said = True
            warnings.warn(f"{type(self).__name__} steps as torch's own: {reason}", FallbackWarning, stacklevel=4)
        # torch wraps `step` of each class that is instantiated, to run hooks: ours has run them already.
        inherited: Any = super().step.__func__  # type: ignore[attr-defined]
        if getattr(inherited, "hooked", False):
            inherited = inherited.__wrapped__
        inherited(self)
        return loss

    def _tensors(self, group: dict[str, Any]) -> tuple[list[torch.Tensor], ...] | str:
        """Parameters, gradients, both moments and step counts of a group; or why the kernel does not fit."""
        for option in ("amsgrad", "maximize", "differentiable"):
            if group[option]:
                return f"{option}=True"
        for name, value in (("lr", group["lr"]), *(("a beta", b) for b in group["betas"])):
            if isinstance(value, torch.Tensor):
                return f"{name} is a tensor"
        if flushed(group["eps"], group["betas"][1]):
            return f"eps={group['eps']} is as small as moments that the kernel counts as zero"
        lists: tuple[list[torch.Tensor], ...] = ([], [], [], [], [])
        for p in group["params"]:
            if p.grad is None:
                continue
            if survey((p, p.grad))[2]:
                return f"a parameter or gradient is a {type(p).__name__}, or lazily negated or zero"
            if p.dtype is not torch.float32 or not p.is_cpu:
                return f"a parameter is {p.dtype} on {p.device}, the kernel takes float32 on the CPU"
            if not is_dense(p) or p.grad.layout is not torch.strided:
                return "a parameter or gradient is neither contiguous nor channels_last"
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            gradient, strides = p.grad, p.stride()
            if gradient.stride() != strides:
                gradient = torch.empty_like(p).copy_(gradient)
            for name in ("exp_avg", "exp_avg_sq"):  # loaded ones may be laid out otherwise
                if state[name].shape == p.shape and state[name].stride() != strides:
                    state[name] = torch.empty_like(p, dtype=state[name].dtype).copy_(state[name])
            for x in (gradient, state["exp_avg"], state["exp_avg_sq"]):
                if x.dtype is not torch.float32 or x.shape != p.shape or x.stride() != strides or not x.is_cpu:
                    return "a loaded state or a gradient has another dtype or shape than its parameter"
            if survey((state["exp_avg"], state["exp_avg_sq"], state["step"]))[2]:
                return "a state is of a tensor subclass"
            members = (p, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"])
            for list_, x in zip(lists, members, strict=True):
                list_.append(x)
        return lists


class Adam(_OneCall, torch.optim.Adam):
    """torch.optim.Adam: same arguments, same state_dict; on CPU float32 parameters one fused call a step.

    Numbers below 1.2e-38 count as zero in that call. What it does not take (other dtypes and devices, sharded
    parameters, amsgrad, maximize, a tensor as lr, sparse gradients, an eps below 1e-15) steps as torch's own, with a
    FallbackWarning once.
    """


class AdamW(_OneCall, torch.optim.AdamW):
    """torch.optim.AdamW, as `Adam` is torch.optim.Adam."""
