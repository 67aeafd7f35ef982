"""What the expressions of a method call: children, and activations as functions or methods of tensors."""

from __future__ import annotations

import ast
import operator
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.fusion.chains import Residual, doubles, letter
from genai_fast.fusion.run import flat, norm_at_end


class Called(NamedTuple):
    """An activation that is called as a function, or as a method of a tensor (function is None then)."""

    module: nn.Module
    function: Any
    method: str
    settings: tuple[Any, ...]
    named: dict[str, Any]

    def __str__(self) -> str:
        return f"{type(self.module).__name__}()"


class Sum(NamedTuple):
    """The sum of a norm's result and a residual: on which side this stands, and whether the former is changed."""

    left: bool
    inplace: bool
    spelled: str = ""  # of a tensor's method, or "torch.add"

    def __call__(self, y: Any, residual: Any) -> Any:
        if self.inplace:
            return operator.iadd(y, residual)
        first, second = (residual, y) if self.left else (y, residual)
        if self.spelled == "torch.add":
            return torch.add(first, second)
        return getattr(first, self.spelled)(second) if self.spelled else first + second

    @property
    def usual(self) -> bool:
        """Whether it is still PyTorch's sum."""
        return self.spelled != "torch.add" or torch.add is _ADD

    def __str__(self) -> str:
        return "residual"


_ADD = torch.add
RESIDUAL = Residual()  # the module of a Sum in a chain

# The constructors take what the functions do, except for torch.relu and torch.selu.
FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    F.relu: nn.ReLU, F.leaky_relu: nn.LeakyReLU, F.silu: nn.SiLU, F.gelu: nn.GELU, torch.relu: lambda: nn.ReLU(),
    F.elu: nn.ELU, F.relu6: nn.ReLU6, F.selu: nn.SELU, F.hardswish: nn.Hardswish, F.softplus: nn.Softplus,
    F.mish: nn.Mish, torch.selu: lambda: nn.SELU(),
    **dict.fromkeys((F.tanh, torch.tanh), nn.Tanh), **dict.fromkeys((F.sigmoid, torch.sigmoid), nn.Sigmoid),
}  # fmt: skip


def _doubling(*settings: Any, **named: Any) -> nn.Module:
    upsample = nn.Upsample(*settings, **named)
    if not doubles(upsample):
        raise ValueError("it does something else")
    return upsample


FUNCTIONS[F.interpolate] = _doubling
METHODS = {"relu": lambda: nn.ReLU(), "relu_": lambda: nn.ReLU(True), "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class Step(NamedTuple):
    """A call of one module or activation on one value."""

    given: ast.expr
    name: str | Called
    module: nn.Module


class Chain(NamedTuple):
    """Steps that follow each other: paths of children, activations, and the sum with a residual."""

    steps: tuple[str | Called | Sum, ...]
    modules: tuple[nn.Module, ...]
    quiet: bool = True  # whether nothing is computed between the norm and the sum


def calls_nothing(node: ast.expr) -> bool:
    """Whether an expression only looks at what is there."""
    acts = (ast.Call, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
    return not any(isinstance(n, acts) for n in ast.walk(node))


class Begun:
    """A norm whose residual is added by a later statement, and the number of its chain once it is made."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm, self.chain = norm, -1


class Summed(NamedTuple):
    """A sum in the source: what gives the norm's result, and the residual."""

    given: ast.expr
    residual: ast.expr
    how: Sum
    begun: Begun | None  # where the norm is in an earlier statement, and `given` the variable


class Reader:
    """Tells the steps of a method's expressions.

    Args:
        model: the module whose method it is.
        self_name: what the method calls it.
        names: the globals of the method.
    """

    def __init__(self, model: nn.Module, self_name: str, names: dict[str, Any]) -> None:
        self.model, self.self, self.globals = model, self_name, names
        self.bound: set[str] = set()  # names that are not global ones
        self.variables: set[str] = set()  # of this method alone, that no function inside it sees

    def step(self, node: ast.expr | None) -> Step | None:
        if not isinstance(node, ast.Call) or any(isinstance(a, ast.Starred) for a in node.args):
            return None
        path = self._path(node.func)
        if path and (child := self._child(node.func)) is not None:
            alone = len(node.args) == 1 and not node.keywords
            return Step(node.args[0], path, child) if alone else None
        function, method = (self.function(node.func) if node.args else None), ""
        make = FUNCTIONS.get(function)
        if make is not None:
            given, settings = node.args[0], node.args[1:]
        elif isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            function, method, given, settings = None, node.func.attr, node.func.value, node.args
            make = METHODS[method]
            before = self.step(given)
            if (before is None or letter(before.module) == ".") and self.summed(given) is None:
                return None  # it may not be a tensor
        else:
            return None
        try:
            constants = tuple(map(ast.literal_eval, settings))
            named = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
            module = make(*constants, **named)
        except (ValueError, TypeError):  # a setting that is no constant, or none of the function
            return None
        return Step(given, Called(module, function, method, constants, named), module)

    def named(self, node: ast.expr) -> Any:
        """What a dotted name is in the module of the method; None if it is none."""
        if isinstance(node, ast.Name):
            return None if node.id in self.bound else self.globals.get(node.id)
        owner = self.named(node.value) if isinstance(node, ast.Attribute) else None
        return vars(owner).get(node.attr) if isinstance(owner, types.ModuleType) else None

    def function(self, node: ast.expr) -> Any:
        """The function that a dotted name is; None if it is none."""
        found = self.named(node)
        return found if isinstance(found, (types.FunctionType, types.BuiltinFunctionType)) else None

    def _path(self, node: ast.expr) -> str:
        """a.0.b of self.a[0].b; "" of anything else."""
        parts: list[str] = []
        while not isinstance(node, ast.Name):
            if isinstance(node, ast.Attribute):
                parts.append(node.attr)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                parts.append(str(node.slice.value))
            else:
                return ""
            node = node.value
        return ".".join(reversed(parts)) if node.id == self.self else ""

    def _child(self, node: ast.expr) -> nn.Module | None:
        """The module that self.a, self.a[0] or self.a.b is now."""
        if isinstance(node, ast.Name):
            return self.model
        owner = self._child(node.value)
        if isinstance(node, ast.Attribute):
            return None if owner is None else owner._modules.get(node.attr)
        if type(owner) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            return None
        return owner._modules.get(str(node.slice.value))

    def norm(self, node: ast.expr) -> nn.Module | None:
        """The norm whose result the expression is, perhaps after an activation; an nn.Sequential may hold both."""
        modules: list[nn.Module] = []
        while len(modules) < 2 and (step := self.step(node)) is not None:
            modules, node = [*flat([step.module]), *modules], step.given
        at = norm_at_end(modules)
        return None if at is None else modules[at]

    def summed(self, node: ast.expr | None) -> Summed | None:
        """norm(...) + residual, or the other way round, if computing the residual leaves the norm alone."""
        addends = self.addends(node)
        if addends is None:
            return None
        first, second, spelled = addends
        inplace = getattr(node, "inplace", False)
        for given, residual, left in ((first, second, False), (second, first, True)):
            if left and spelled == "add_":
                return None  # the residual is changed
            begun = getattr(given, "begun", None)
            norm = begun.norm if begun is not None else self.norm(given)
            if norm is not None and not isinstance(residual, ast.Constant) and self.harmless(residual, norm):
                return Summed(given, residual, Sum(left, inplace, spelled), begun)
        return None

    def addends(self, node: ast.AST | None) -> tuple[ast.expr, ast.expr, str] | None:
        """The two of a sum, as they are computed, and how it is spelled: "" with an operator."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return node.left, node.right, ""
        if not isinstance(node, ast.Call) or node.keywords or any(isinstance(a, ast.Starred) for a in node.args):
            return None
        function = self.function(node.func)
        if function in (_ADD, operator.add) and len(node.args) == 2:
            return node.args[0], node.args[1], "torch.add" if function is _ADD else ""
        method = isinstance(node.func, ast.Attribute) and node.func.attr in ("add", "add_") and len(node.args) == 1
        if not method or function is not None or self._path(node.func):
            return None
        return node.func.value, node.args[0], node.func.attr

    def harmless(self, node: ast.expr, norm: nn.Module) -> bool:
        """Whether the expression reads variables and calls children and activations, none of which holds the norm."""
        if isinstance(node, (ast.Name, ast.Constant)):
            return isinstance(node, ast.Constant) or node.id in self.variables
        if isinstance(node, ast.BinOp):
            return self.harmless(node.left, norm) and self.harmless(node.right, norm)
        if isinstance(node, ast.IfExp):
            return calls_nothing(node.test) and self.harmless(node.body, norm) and self.harmless(node.orelse, norm)
        if isinstance(node, ast.Call) and self._is_absent(node.func) and len(node.args) == 1 and not node.keywords:
            return self.harmless(node.args[0], norm)
        step = self.step(node)
        if step is None or (isinstance(step.name, str) and any(m is norm for m in step.module.modules())):
            return False
        return self.harmless(step.given, norm)

    def _is_absent(self, node: ast.expr) -> bool:
        """Whether that is a child which may be there, and is None now."""
        owner = self._child(node.value) if isinstance(node, ast.Attribute) and self._path(node) else None
        return owner is not None and {**vars(owner), **owner._modules}.get(node.attr, owner) is None

    def quiet(self, node: ast.expr) -> bool:
        """Whether nothing happens when the expression is evaluated."""
        return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id in self.variables)
