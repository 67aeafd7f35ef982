"""What a function computes, as an expression in which other spellings of one computation look alike.

Straight lines are read: assignments and a return, of arithmetic, of tensors' methods and torch's functions, and of
functions and methods whose own source is such a line. All else is Refused.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from genai_fast.fusion.source import Refused, source_of

# (operation, *operands). Leaves: ("argument", k), ("own", name) of self, ("constant", value).
Expression = tuple[Any, ...]
_DEEPEST = 4  # calls in calls

# Operations as methods of tensors and as functions, and the names of what follows their tensor.
_OPERATIONS: dict[str, tuple[str, ...]] = {
    "rsqrt": (), "sqrt": (), "square": (), "pow": ("exponent",), "mean": ("dim", "keepdim"), "to": ("dtype",),
    "float": (), "type_as": ("other",), "mul": ("other",), "add": ("other",), "neg": (), "unsqueeze": ("dim",),
    "cat": ("dim",), "chunk": ("chunks", "dim"), "silu": (), "gelu": ("approximate",),
}  # fmt: skip
_FUNCTIONS = {
    getattr(owner, name): name for owner in (torch, F) for name in _OPERATIONS if hasattr(owner, name)
}  # fmt: skip
_BINARY = {ast.Mult: "mul", ast.Add: "add", ast.Div: "div", ast.Pow: "pow", ast.Sub: "sub", ast.FloorDiv: "floordiv"}
_COMMUTATIVE = {"mul", "add"}


class Dependency(NamedTuple):
    """What an expression relies on: this attribute of the owner (item of a dictionary) is this value."""

    owner: Any
    name: str
    value: Any

    def holds(self) -> bool:
        if isinstance(self.owner, dict):
            return self.owner.get(self.name) is self.value
        return getattr(self.owner, self.name, None) is self.value


class Meaning(NamedTuple):
    """The expression, what must stay as it is for it to hold, and the methods of self that were read."""

    expression: Expression
    dependencies: tuple[Dependency, ...]
    methods: frozenset[str]

    def holds(self) -> bool:
        """Whether the functions and methods that were read are still those."""
        return all(dependency.holds() for dependency in self.dependencies)


def meaning(function: Any, cls: type | None = None) -> Meaning:
    """Of a function, or of a method of cls. Raises Refused: why it cannot be told."""
    if not isinstance(function, types.FunctionType):
        raise Refused("it is no plain function")
    found = _meaning(function, function.__code__, cls)
    if isinstance(found, Refused):
        raise found
    return found


@functools.lru_cache(256)
def _meaning(function: types.FunctionType, code: types.CodeType, cls: type | None) -> Meaning | Refused:
    reader = _Reader(cls)
    arguments: list[Expression] = [("self",)] if cls is not None else []
    count = code.co_argcount - len(arguments)
    arguments += [("argument", k) for k in range(count - len(function.__defaults__ or ()))]
    try:
        expression = reader.called(function, arguments, {}, 0)
    except Refused as reason:
        return reason
    except (TypeError, ValueError, KeyError, IndexError) as error:
        return Refused(f"it cannot be read ({type(error).__name__}: {error})")
    depends = {(id(d.owner), d.name): d for d in reader.dependencies}
    return Meaning(expression, tuple(depends.values()), frozenset(reader.methods))


class _Reader:
    """Follows a function's statements, and keeps what it relied on."""

    def __init__(self, cls: type | None) -> None:
        self.cls, self.dependencies, self.methods = cls, [], set()

    def called(self, function: types.FunctionType, given: list[Expression], named: dict[str, Expression], depth: int):
        """The result of a call."""
        if depth > _DEEPEST:
            raise Refused("its calls go too deep")
        definition = source_of(function).definition
        self.dependencies.append(Dependency(function, "__code__", function.__code__))
        args = definition.args
        if args.vararg or args.kwarg or args.kwonlyargs:
            raise Refused("it takes any number of arguments")
        names = [a.arg for a in (*args.posonlyargs, *args.args)]
        defaults = function.__defaults__ or ()
        values = {n: ("constant", v) for n, v in zip(names[len(names) - len(defaults) :], defaults, strict=True)}
        values |= dict(zip(names, given, strict=False)) | named
        if len(given) > len(names) or values.keys() != set(names):
            raise Refused("its arguments do not fit")
        for statement in definition.body:
            if isinstance(statement, ast.Return) and statement.value is not None:
                return self.value(statement.value, values, function, depth)
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                _assign(statement.targets[0], self.value(statement.value, values, function, depth), values)
            elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                raise Refused("it is no straight line")
        raise Refused("it returns nothing")

    def value(self, node: ast.expr, values: dict[str, Expression], function: types.FunctionType, depth: int):
        of: Callable[[ast.expr], Expression] = lambda n: self.value(n, values, function, depth)  # noqa: E731
        match node:
            case ast.Constant():
                return "constant", node.value
            case ast.Name() if node.id in values:
                return values[node.id]
            case ast.Name() if node.id not in function.__code__.co_freevars:
                found = function.__globals__.get(node.id)
                if isinstance(found, types.FunctionType):
                    self.dependencies.append(Dependency(function.__globals__, node.id, found))
                return "constant", found
            case ast.Tuple() | ast.List():
                return "tuple", *map(of, node.elts)
            case ast.UnaryOp(op=ast.USub()):
                return _negative(of(node.operand))
            case ast.BinOp() if type(node.op) in _BINARY:
                return _normal(_BINARY[type(node.op)], of(node.left), of(node.right))
            case ast.Attribute():
                return self._attribute(of(node.value), node.attr)
            case ast.Subscript():
                return _part(of(node.value), node.slice, of)
            case ast.Call() if not any(isinstance(a, ast.Starred) for a in node.args):
                named = {k.arg: of(k.value) for k in node.keywords}
                return self._call(node.func, [of(a) for a in node.args], named, of, depth)
        raise Refused(f"{type(node).__name__} is not read")

    def _attribute(self, owner: Expression, name: str) -> Expression:
        if owner == ("self",):
            return "own", name
        if owner[0] == "constant":
            if not isinstance(owner[1], types.ModuleType):
                raise Refused(f"{name} of a global is not read")
            found = vars(owner[1]).get(name)
            self.dependencies.append(Dependency(owner[1], name, found))
            return "constant", found
        if name == "dtype":
            return owner[2] if owner[0] == "to" else ("dtype", owner)
        if name == "shape":
            return "shape", owner
        raise Refused(f"{name} is not read")

    def _call(
        self, callee: ast.expr, given: list[Expression], named: dict[str | None, Expression], of: Any, depth: int
    ):
        if None in named:
            raise Refused("it passes on any number of arguments")
        if isinstance(callee, ast.Attribute):
            owner = of(callee.value)
            if owner == ("self",):
                method = inspect.getattr_static(self.cls, callee.attr, None)
                if not isinstance(method, types.FunctionType):
                    return "called", callee.attr, *given
                self.dependencies.append(Dependency(self.cls, callee.attr, method))
                self.methods.add(callee.attr)
                return self.called(method, [owner, *given], named, depth + 1)
            if owner[0] != "constant":
                if callee.attr not in _OPERATIONS:
                    raise Refused(f"{callee.attr} is not read")
                self.dependencies.append(Dependency(torch.Tensor, callee.attr, getattr(torch.Tensor, callee.attr)))
                return _operation(callee.attr, owner, given, named)
        kind, *found = of(callee)
        if kind != "constant":
            raise Refused("it calls a value")
        if isinstance(found[0], (types.FunctionType, types.BuiltinFunctionType)) and found[0] in _FUNCTIONS:
            return _operation(_FUNCTIONS[found[0]], given[0], given[1:], named)
        if not isinstance(found[0], types.FunctionType) or (found[0].__module__ or "").startswith("torch."):
            raise Refused("it calls what is not read")
        return self.called(found[0], given, named, depth + 1)


def _assign(target: ast.expr, value: Expression, values: dict[str, Expression]) -> None:
    if isinstance(target, ast.Name):
        values[target.id] = value
    elif isinstance(target, ast.Tuple) and value[0] == "tuple" and len(target.elts) == len(value) - 1:
        for element, part in zip(target.elts, value[1:], strict=True):
            _assign(element, part, values)
    else:
        raise Refused("it assigns to what is no variable")


def _negative(x: Expression) -> Expression:
    if x[0] == "constant" and isinstance(x[1], (int, float)):
        return "constant", -x[1]
    return "neg", x


def _part(x: Expression, index: ast.expr, of: Callable[[ast.expr], Expression]) -> Expression:
    """x[..., : n], x[..., n :] or x.shape[-1]; the halves of the last dimension are one operation."""
    if x[0] == "shape" and of(index) == ("constant", -1):
        return "columns", x[1]
    match index:
        case ast.Tuple(elts=[ast.Constant(value=e), ast.Slice(lower=lower, upper=upper, step=None)]) if e is Ellipsis:
            ends = None if lower is None else of(lower), None if upper is None else of(upper)
            half = "floordiv", ("columns", x), ("constant", 2)
            if ends in ((None, half), (half, None)):
                return "half", x, int(ends[0] is not None)
            return "slice", x, *ends
    raise Refused("an index is not read")


def _operation(name: str, x: Expression, given: list[Expression], named: dict[str, Expression]) -> Expression:
    """A method or function of a tensor, by the one name that each operation has here."""
    following = _OPERATIONS[name]
    if len(given) > len(following) or not set(named) <= set(following[len(given) :]):
        raise Refused(f"arguments of {name} are not read")
    settings = {**dict(zip(following, given, strict=False)), **named}
    match name:
        case "float":
            return "to", x, ("constant", torch.float32)
        case "type_as":
            return "to", x, settings["other"][2] if settings["other"][0] == "to" else ("dtype", settings["other"])
        case "mean" if settings == {"dim": ("constant", -1), "keepdim": ("constant", True)}:
            return "mean", x
        case "chunk" if settings == {"chunks": ("constant", 2), "dim": ("constant", -1)}:
            return "tuple", ("half", x, 0), ("half", x, 1)
        case "cat" if settings.get("dim") == ("constant", -1) and x[0] == "tuple":
            return "cat", *x[1:]
        case "gelu":
            return "gelu", x, settings.get("approximate", ("constant", "none"))
        case "mean" | "chunk" | "cat":
            raise Refused(f"arguments of {name} are not read")
        case _ if len(settings) == len(following):
            return _normal(name, x, *(settings[n] for n in following))
    raise Refused(f"arguments of {name} are not read")


def _normal(name: str, *operands: Expression) -> Expression:
    """Of the ways to write a square, a root and a quotient by a root, one."""
    match name, *operands:
        case ("pow", x, ("constant", 2)):
            return "square", x
        case ("pow", x, ("constant", -0.5)):
            return "rsqrt", x
        case ("pow", x, ("constant", 0.5)):
            return "sqrt", x
        case ("mul", x, y) if x == y:
            return "square", x
        case ("div", ("constant", 1), ("sqrt", x)):
            return "rsqrt", x
        case ("div", x, ("sqrt", y)):
            return "mul", x, ("rsqrt", y)
    return name, *operands


def matches(pattern: Expression, expression: Expression, found: dict[str, Any]) -> dict[str, Any] | None:
    """The pattern's names with what they stand for in the expression, beside those found; None if it is another one.

    In a pattern ("own", "WEIGHT"), in capitals, stands for any attribute of self, and ("any", name) for any expression.
    """
    if not isinstance(pattern, tuple) or not isinstance(expression, tuple):
        same = type(pattern) is type(expression) or not {type(pattern), type(expression)} & {bool, str}
        return found if same and pattern == expression else None
    if pattern[0] == "any" or (pattern[0] == "own" == expression[0] and pattern[1].isupper()):
        value = expression if pattern[0] == "any" else expression[1]
        return {**found, pattern[1]: value} if found.get(pattern[1], value) == value else None
    if pattern[0] != expression[0] or len(pattern) != len(expression):
        return None
    orders = [expression[1:]]
    if pattern[0] in _COMMUTATIVE:
        orders.append(expression[:0:-1])
    for order in orders:
        result: dict[str, Any] | None = found
        for a, b in zip(pattern[1:], order, strict=True):
            result = None if result is None else matches(a, b, result)
        if result is not None:
            return result
    return None
