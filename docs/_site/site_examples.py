"""An example call of an op, from its first test case: written as a person would, with random numbers."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from genai_fast import ops
from genai_fast.kernels.common.spec import OpSpec, Tensors

MOST_COLUMNS = 74  # of a call; what fits on a page without scrolling
MOST_ITEMS = 2  # of a list of tensors; longer ones are the weights of whole models


def example(op: OpSpec) -> str:
    """Python that imports, makes the tensors and calls the op; "" if the case has long lists of tensors."""
    function = getattr(ops, op.name)
    inputs = op.cases[0].inputs(Tensors())
    inputs = {name: inputs[name] for name in inspect.signature(function).parameters if name in inputs}
    if any(_is_weights(value) for value in inputs.values()):
        return ""
    inputs = {name: value for name, value in inputs.items() if value is not None}
    made = {name: value for name, value in inputs.items() if isinstance(value, (torch.Tensor, list))}
    torch.manual_seed(0)
    names = {"torch": torch, "ops": ops}
    lines = [f"{name} = {_expression(value)}" for name, value in made.items()]
    exec("\n".join(lines), names)
    first, *others = inputs
    arguments = [first, *(f"{name}={name if name in made else _constant(inputs[name])}" for name in others)]
    call = f"ops.{op.name}({', '.join(arguments)})"
    if len(call) > MOST_COLUMNS:
        call = f"ops.{op.name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"
    result = eval(call, names)
    assigned = f"result = {call}" if result is not None else call
    shape = "" if result is None else f"\n# {_described(result)}"
    return "\n".join(("import torch", "", "from genai_fast import ops", "", *lines, "", assigned)) + shape


def _is_weights(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > MOST_ITEMS and isinstance(value[0], torch.Tensor)


def _expression(value: Any) -> str:
    """Python for a tensor of this shape, dtype and sign, or for a list of such."""
    if not isinstance(value, torch.Tensor):
        return f"[{', '.join(map(_expression, value))}]"
    sizes, gradient = ", ".join(map(str, value.shape)), ", requires_grad=True" * value.requires_grad
    if value.dim() == 0 or value.numel() <= 4:
        dtype = ", dtype=torch.int32" * (value.dtype is torch.int32)
        return f"torch.tensor({_numbers(value.tolist())}{dtype}{gradient})"
    if not value.is_floating_point():
        return f"torch.randint({int(value.max()) + 1}, ({sizes},))"
    if not value.any():
        return f"torch.zeros({sizes}{gradient})"
    return f"torch.{'rand' if value.min() >= 0 else 'randn'}({sizes}{gradient})"


def _constant(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _numbers(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_numbers, value))}]"
    return f"{value:.2f}" if isinstance(value, float) else repr(value)


def _described(result: Any) -> str:
    if isinstance(result, torch.Tensor):
        return f"{str(result.dtype).removeprefix('torch.')} {list(result.shape)}"
    names = getattr(result, "_fields", range(len(result)))
    return ", ".join(f"{name}: {_described(part)}" for name, part in zip(names, result, strict=True))
