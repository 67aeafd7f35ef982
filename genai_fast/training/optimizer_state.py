"""An optimizer's state as JSON data and named tensors, and back."""

import math
from typing import Any

import torch

# How a step is carried out, as against what it computes: these stay as the present optimizer has them.
_EXECUTION = ("foreach", "fused", "capturable", "differentiable")
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, beside the count of steps


class Mismatch(ValueError):
    """The state is of an optimizer of other parameters."""


class Damaged(ValueError):
    """The state is of no optimizer."""


def pack(optimizer: torch.optim.Optimizer) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The groups' settings as JSON data, and the parameters' state as "<number of the parameter>.<name>"."""
    state = optimizer.state_dict()
    tensors = {f"{index}.{name}": x for index, values in state["state"].items() for name, x in values.items()}
    return [{k: _number(v) for k, v in group.items()} for group in state["param_groups"]], tensors


def unpack(
    optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """What the optimizer's `load_state_dict` takes, from what `pack` gave.

    Raises:
        Mismatch: it is for other parameters.
        Damaged: a setting or a tensor is not such as this optimizer has.
    """
    present = optimizer.state_dict()["param_groups"]
    members = [g.get("params") if isinstance(g, dict) else None for g in groups]
    if members != [g["params"] for g in present]:
        count = sum(len(x) for x in members if isinstance(x, list))
        raise Mismatch(
            f"expected an optimizer of {sum(len(g['params']) for g in present)} parameters in {len(present)} groups,"
            f" got {count} in {len(groups)}"
        )
    parameters = dict(enumerate(p for g in optimizer.param_groups for p in g["params"]))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        shape = parameters[int(index)].shape if index.isdecimal() and int(index) in parameters else None
        if shape is None or (value.dim() and value.shape != shape):  # 0-d: a count of steps
            wanted = "no such tensor" if shape is None else str(tuple(shape))
            raise Damaged(f"optimizer.{key}: expected {wanted}, got {tuple(value.shape)}")
        if not value.dim() and shape and name in _MOMENTS:
            raise Damaged(f"optimizer.{key}: expected {tuple(shape)}, got ()")
        state.setdefault(int(index), {})[name] = value
    if isinstance(optimizer, torch.optim.Adam):  # AdamW too
        for index, found in state.items():
            if missing := {"step", *_MOMENTS} - found.keys():
                raise Damaged(f"optimizer.{index}: expected {', '.join(sorted(missing))}, got none")
    return {"state": state, "param_groups": [_merged(old, new) for old, new in zip(groups, present, strict=True)]}


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A group with the settings that were saved, carried out as the present one."""
    examples = {"initial_lr": 1.0, **new}  # which a schedule of the rate adds
    for k, v in old.items():
        if k in examples and k not in _EXECUTION and not _alike(v, _number(examples[k])):
            raise Damaged(f"optimizer: {k}: expected such as {examples[k]}, got {v!s:.60}")
    numbers = {k for k, v in new.items() if isinstance(_number(v), float | tuple)}
    if missing := numbers - old.keys() - {"initial_lr"}:
        raise Damaged(f"optimizer: expected {', '.join(sorted(missing))}, got none")
    settings = {k: tuple(v) if k == "betas" else v for k, v in old.items()}  # JSON has lists only
    if isinstance(new["lr"], torch.Tensor):
        settings["lr"] = torch.full_like(new["lr"], settings["lr"])
    return {**new, **settings, **{k: new[k] for k in _EXECUTION if k in new}}


def _alike(value: Any, example: Any) -> bool:
    """Whether a value from JSON may stand for the example."""
    if isinstance(example, list | tuple):
        return isinstance(value, list) and len(value) == len(example) and all(map(_alike, value, example))
    if isinstance(example, bool | str | None):
        return type(value) is type(example)
    return type(value) in (int, float) and math.isfinite(value)


def _number(x: Any) -> Any:
    """JSON has no tensors: a rate that is one becomes a number."""
    return x.item() if isinstance(x, torch.Tensor) else x
