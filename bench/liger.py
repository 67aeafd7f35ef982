"""Cases of our ops through Liger's kernels, for the page of predicted times (bench.predict).

What Liger leaves to PyTorch is computed too (layer_norm's sum with the residual, a bias before the activation, the sums
of partial gradients, copies of what is not contiguous); `LeftToPyTorch` counts what that moves, matrix products apart.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from liger_kernel.ops import (
    cross_entropy,
    fused_add_rms_norm,
    fused_linear_cross_entropy,
    geglu,
    layer_norm,
    rope,
    swiglu,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from genai_fast.kernels.common.launch import next_power_of_2

Outputs = tuple[torch.Tensor, ...]


def _layer_norm(x, weight, bias, residual) -> Outputs:
    return (layer_norm.LigerLayerNormFunction.apply(x + residual, weight, bias, 1e-5),)


def _rms_norm(x, weight, residual) -> Outputs:
    return fused_add_rms_norm.LigerFusedAddRMSNormFunction.apply(x, residual, weight, 1e-6, 0.0, "llama", False)


def _cross_entropy(logits, target) -> Outputs:
    return cross_entropy.LigerCrossEntropyFunction.apply(logits, target, None)[:1]


def _linear_cross_entropy(x, weight, target, bias) -> Outputs:
    return fused_linear_cross_entropy.LigerFusedLinearCrossEntropyFunction.apply(x, weight, target, bias)[:1]


def _gated_act(x, up=None, bias=None, activation="silu") -> Outputs:
    if bias is not None:
        x = x + bias
    if activation == "gelu":  # Liger's is the approximation with tanh
        return (geglu.LigerGELUMulFunction.apply(*(x.chunk(2, -1) if up is None else (x, up))),)
    if up is None:
        return (swiglu.LigerFusedGateUpSiLUMulFunction.apply(x),)
    return (swiglu.LigerSiLUMulFunction.apply(x, up),)


def _rotary(x, cos, sin) -> Outputs:
    """Liger turns queries and keys in one launch: here heads of x, a number that needs no padding."""
    heads = next_power_of_2(x.size(1)) // 2
    with _disable_current_modes():  # models have such tables
        tables = [torch.cat((table, table), -1).to(x.dtype) for table in (cos, sin)]
    return rope.LigerRopeFunction.apply(x[:, :heads], x[:, heads:], *tables)


CALLS: dict[str, Callable[..., Outputs]] = {
    "layer_norm": _layer_norm, "rms_norm": _rms_norm, "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy, "gated_act": _gated_act, "rotary": _rotary,
}  # fmt: skip


def serves(name: str, inputs: dict[str, Any]) -> bool:
    """Whether Liger has that op with these options."""
    return name in CALLS and not inputs.get("interleaved")


def call(name: str, inputs: dict[str, Any], multiprocessors: int) -> Outputs:
    """The outputs, after a backward pass whose incoming gradients are ones: Liger's loss then leaves out a launch.

    Args:
        multiprocessors: of the GPU that runs it.
    """
    with _on(multiprocessors):
        outputs = CALLS[name](**inputs)
        targets = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        with _disable_current_modes():
            ones = [torch.ones_like(y) for y in outputs]
        torch.autograd.grad(outputs, targets, ones)
    return outputs


class LeftToPyTorch(TorchDispatchMode):
    """Inside the block, the bytes that each of PyTorch's own kernels would read and write, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        if not function.is_view and not function._opname.startswith(_NO_KERNEL):
            tensors = [x for x in tree_leaves((arguments, named, result)) if isinstance(x, torch.Tensor)]
            distinct = {x.data_ptr(): x for x in tensors}.values()
            self.bytes.append(sum(x.untyped_storage().nbytes() if 0 in x.stride() else x.nbytes for x in distinct))
        return result


_NO_KERNEL = ("empty", "new_empty", "detach", "_unsafe_view", "_local_scalar_dense", "equal", "mm", "addmm")


@contextlib.contextmanager
def _on(multiprocessors: int) -> Iterator[None]:
    """Liger's norms ask only for CUDA tensors how many multiprocessors there are, and take one elsewhere."""
    with contextlib.ExitStack() as stack:
        for module in (layer_norm, fused_add_rms_norm):
            name = f"{module.__name__.rsplit('.', 1)[1]}_backward"
            source = inspect.getsource(getattr(module, name))
            if source.count("sm_count = 1\n") != 1:
                raise RuntimeError(f"bench.liger: {name} of this version does not count multiprocessors as expected")
            scope = dict(vars(module))
            exec(source.replace("sm_count = 1\n", f"sm_count = {multiprocessors}\n"), scope)
            stack.enter_context(mock.patch.object(module, name, scope[name]))
        yield
