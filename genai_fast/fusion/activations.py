"""The activations before a product, known by what is called: torch's, and classes that compute the same."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import nn

from genai_fast.fusion.chains import obstacle
from genai_fast.fusion.meaning import meaning
from genai_fast.fusion.source import Refused

_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu"}
_OWN = {name: getattr(F, name) for name in ("silu", "gelu")}


def _of_function(function: Any, settings: dict[str, Any]) -> str:
    """Of F.silu or F.gelu, perhaps with settings fixed before."""
    if isinstance(function, functools.partial):
        if function.args or settings:
            return ""
        return _of_function(function.func, function.keywords)
    try:
        name = _FUNCTIONS.get(function, "")
    except TypeError:  # it cannot be hashed
        return ""
    if name == "gelu" and settings.keys() <= {"approximate"}:
        return _GELUS.get(settings.get("approximate", "none"), "")
    return "" if settings else name


@functools.lru_cache(256)
def _of_class(cls: type[nn.Module], forward: Any, code: Any) -> tuple[Any, Any]:
    """(expression, its meaning) of a class's forward; (None, None) if it is not told."""
    try:
        read = meaning(forward, cls)
    except Refused:
        return None, None
    return read.expression, read


def _of_module(module: nn.Module) -> str:
    if obstacle(module) or module._modules:
        return ""
    cls, state = type(module), module.__dict__
    if cls in (nn.SiLU, nn.GELU):
        return "" if state.get("inplace") else _GELUS.get(state.get("approximate"), "silu")
    expression, read = _of_class(cls, cls.forward, getattr(cls.forward, "__code__", None))
    if read is None or not read.holds() or not read.methods.isdisjoint(state):
        return ""
    match expression:
        case ("silu", ("argument", 0)):
            return "silu"
        case ("gelu", ("argument", 0), ("constant", approximate)):
            return _GELUS.get(approximate, "")
        case ("called", name, ("argument", 0)):
            return _of_function(state.get(name), {})
    return ""


def activation_name(called: Any, settings: dict[str, Any]) -> str:
    """The activation that calling this with one tensor and the settings gives; "" for all but SiLU and the GELUs.

    Those two keep their input for backward, as ops.gated_act does: what may be changed in place stays the same.
    """
    if isinstance(called, nn.Module):
        return "" if settings else _of_module(called)
    if any(getattr(F, name) is not own for name, own in _OWN.items()):
        return ""
    return _of_function(called, settings)
