"""Functions that turn queries and keys, `x * cos + rotate_half(x) * sin`: a call of one becomes one kernel a tensor."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any, NamedTuple

import torch

from genai_fast import ops
from genai_fast.backends import choose, forced_backend, is_plain
from genai_fast.fusion import thresholds
from genai_fast.fusion.meaning import Expression, Meaning, matches, meaning
from genai_fast.fusion.source import Refused
from genai_fast.ops.dispatch import left_to_torch

_X, _COS, _SIN = ("any", "x"), ("any", "cos"), ("any", "sin")


def _turned(x: Expression, cos: Expression, sin: Expression) -> Expression:
    half_turn = "cat", ("neg", ("half", x, 1)), ("half", x, 0)
    return "add", ("mul", x, cos), ("mul", half_turn, sin)


def _spread(table: Expression) -> Expression:
    return "unsqueeze", table, ("constant", 1)


def _partly_turned(x: Expression, cos: Expression, sin: Expression) -> Expression:
    columns = "columns", cos
    rotated, kept = ("slice", x, None, columns), ("slice", x, columns, None)
    return "cat", _turned(rotated, cos, sin), kept


_COS_4D, _SIN_4D = _spread(_COS), _spread(_SIN)
_PATTERNS = ((_turned(_X, _COS_4D, _SIN_4D), False), (_partly_turned(_X, _COS_4D, _SIN_4D), True))


class Rotary(NamedTuple):
    """A function that gives one or two of its arguments turned: which, and by which tables [batch or 1, T, D_rot]."""

    meaning: Meaning
    turned: tuple[int, ...]  # positions of its arguments
    cos: int
    sin: int
    partial: bool  # whether only the first D_rot channels turn
    contiguous: tuple[bool, ...]  # whether a result is so, whatever the layout of what is turned
    pair: bool  # whether the result is a tuple


def rotary_of(function: Any) -> Rotary | None:
    """What a function computes, if that is such a turn."""
    if not isinstance(function, types.FunctionType):
        return None
    found = _rotary_of(function, function.__code__, function.__defaults__)
    return found if found is not None and found.meaning.holds() else None


@functools.lru_cache(256)
def _rotary_of(function: types.FunctionType, code: types.CodeType, defaults: Any) -> Rotary | None:
    try:
        read = meaning(function)
    except Refused:
        return None
    pair = read.expression[0] == "tuple"
    found = [_match(part) for part in (read.expression[1:] if pair else [read.expression])]
    if not found or None in found or len({(f["cos"], f["sin"], f["partial"]) for f in found if f}) != 1:
        return None
    at = {name: found[0][name] for name in ("cos", "sin")}
    turned = [f["x"] for f in found]
    if any(x[0] != "argument" for x in (*at.values(), *turned)):
        return None
    contiguous = tuple(f["contiguous"] for f in found)
    partial = found[0]["partial"]
    return Rotary(read, tuple(x[1] for x in turned), at["cos"][1], at["sin"][1], partial, contiguous, pair)


def _match(expression: Expression) -> dict[str, Any] | None:
    for pattern, partial in _PATTERNS:
        found = matches(pattern, expression, {})
        if found is not None:
            first = expression[1][1] if partial else expression[1]  # of a sum, whose layout the sum takes over
            return {**found, "partial": partial, "contiguous": partial or "cat" in (first[1][0], first[2][0])}
    return None


def call(function: Any, *given: Any, **named: Any) -> Any:
    """function(*given, **named), by kernels if it is such a turn of tensors that they take."""
    if torch.compiler.is_compiling() or (given and is_plain(given[0]) and thresholds.rotary(given[0])):
        return function(*given, **named)  # a compiler joins it itself; of small queries the keys are no larger
    rotary = rotary_of(function)
    result = None if rotary is None else _served(rotary, function, given, named)
    return function(*given, **named) if result is None else result


def _served(rotary: Rotary, function: types.FunctionType, given: Any, named: dict[str, Any]) -> Any:
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount]
    bound = {**dict(zip(names, given, strict=False)), **named}
    optional = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
    if len(bound) != len(given) + len(named) or not set(names) - set(optional) <= bound.keys() <= set(names):
        return None
    if any(bound[n] is not default for n, default in optional.items() if n in bound):
        return None  # it was read with its defaults
    xs = [bound[names[k]] for k in rotary.turned]
    cos, sin = bound[names[rotary.cos]], bound[names[rotary.sin]]
    if not _tables_fit(cos, sin) or not all(_fits(x, cos, rotary.partial) for x in xs):
        return None
    if left_to_torch():
        return None
    if choose("rotary", forced_backend(), cos.device.type, cos.dtype)[1]:
        return None
    found = tuple(_turn(x, cos, sin, dense) for x, dense in zip(xs, rotary.contiguous, strict=True))
    return found if rotary.pair else found[0]


def _tables_fit(cos: Any, sin: Any) -> bool:
    if not (is_plain(cos) and is_plain(sin) and cos.dim() == 3 and cos.shape == sin.shape):
        return False
    alike = cos.dtype is sin.dtype and cos.device == sin.device and cos.is_floating_point()
    return alike and not cos.requires_grad and not sin.requires_grad and 0 not in cos.shape


def _fits(x: Any, cos: torch.Tensor, partial: bool) -> bool:
    if not is_plain(x) or x.dim() != 4 or x.dtype is not cos.dtype or x.device != cos.device:
        return False
    columns = cos.size(2)
    wide_enough = columns <= x.size(3) if partial else columns == x.size(3)
    return wide_enough and columns % 2 == 0 and cos.size(0) in (1, x.size(0)) and cos.size(1) == x.size(2)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, contiguous: bool) -> torch.Tensor:
    positions = None
    if cos.size(0) > 1:
        positions = torch.arange(cos.size(0) * cos.size(1), device=x.device).view(cos.shape[:2])
    tables = (table.reshape(-1, table.size(2)) for table in (cos, sin))
    y = ops.rotary(x, *tables, positions=positions, full=True)
    return y.contiguous() if contiguous else y


def describe(function: types.FunctionType) -> str:
    """For a table: its name and arguments."""
    return f"{function.__name__}({', '.join([*inspect.signature(function).parameters][:2])}, ...)"
