"""Hand-written methods: chains of calls in their source are found, and compiled again as one call each.

Everything else of a method stays what it was: its branches, loops, flags and names are compiled from the same source
into the same code, so nothing is frozen. A chain is what calls children and activations on one another's results:
nested in one expression, or by statements in a row, where nothing else can see what is in between.
"""

from __future__ import annotations

import ast
import copy
import inspect
import types
from collections.abc import Callable, Iterator, Set
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.fusion import attention_calls, functions, latents, rotary_calls
from genai_fast.fusion.chains import letter, spans
from genai_fast.fusion.explanation import NOTHING_HERE
from genai_fast.fusion.products import ProductFinder
from genai_fast.fusion.source import NothingFound, Refused, source_of, unwrapped
from genai_fast.fusion.written import Called, Chain, Written, look_first

_SEE_ALL = {"locals", "vars", "eval", "exec"}  # who calls these may look at any variable


# The constructors take what the functions do, except for torch.relu.
_FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    F.relu: nn.ReLU, F.leaky_relu: nn.LeakyReLU, F.silu: nn.SiLU, F.gelu: nn.GELU, torch.relu: lambda: nn.ReLU(),
    **dict.fromkeys((F.tanh, torch.tanh), nn.Tanh), **dict.fromkeys((F.sigmoid, torch.sigmoid), nn.Sigmoid),
}  # fmt: skip
_METHODS = {"relu": lambda: nn.ReLU(), "relu_": lambda: nn.ReLU(True), "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def _is_worth(chain: Chain, random: bool) -> bool:
    """Whether something of it runs as one; for convolutions alone nothing is replaced."""
    cut = spans("".join([letter(module, random) for module in chain.modules]))
    return any(r.fused and r.letters.strip("CAaI") for r in cut)


class _Step(NamedTuple):
    """A call of one module or activation on one value."""

    given: ast.expr
    name: str | Called
    module: nn.Module


class _Rewriter(ProductFinder):
    """Puts one call in the place of each chain that holds something to run as one."""

    def __init__(
        self, model: nn.Module, function: types.FunctionType, definition: ast.FunctionDef, random: bool
    ) -> None:
        arguments = definition.args.posonlyargs + definition.args.args
        if not arguments:
            raise Refused("it takes no self")
        self.model, self.self, self.globals = model, arguments[0].arg, function.__globals__
        self.random = random
        code = function.__code__
        names = [node for node in ast.walk(definition) if isinstance(node, ast.Name)]
        self.bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        self.bound |= {a.arg for a in ast.walk(definition) if isinstance(a, ast.arg)}
        self.bound |= {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
        if any(node.id == self.self and not isinstance(node.ctx, ast.Load) for node in names):
            raise Refused(f"it assigns to {self.self}")
        # Variables of this method alone, that no function inside it sees.
        self.variables = set() if _SEE_ALL & set(code.co_names) else set(code.co_varnames) - set(code.co_cellvars)
        self.parameters = {a.arg for a in ast.walk(definition.args) if isinstance(a, ast.arg)}
        self.uses = {name: sum(node.id == name for node in names) for name in self.variables}
        self.prefix = "chain"
        while any(name.startswith(self.prefix) for name in {*self.bound, *code.co_names}):
            self.prefix = f"_{self.prefix}"
        self.chains: list[Chain] = []
        self.calls, self.notes = {}, []
        self.kept: set[ast.stmt] = set()  # what a call before them falls back on
        self.swallows = False  # whether exceptions may be caught here, so that later code sees intermediate values
        self.find_held(definition)
        definition.body = self._body(definition.body)

    # --- statements in a row become one expression

    def _body(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        if self.swallows:
            return [self.visit(statement) for statement in statements]
        joined: list[ast.stmt] = []
        for statement in self._found(statements):
            if joined and (whole := self._joined(joined[-1], statement)):
                joined[-1] = whole
            else:
                joined.append(statement)
        return [self.visit(statement) for statement in joined]

    def _found(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """The statements, with a call before those in a row that an op does at once."""
        made: list[ast.stmt] = []
        for statement in statements:
            made.append(statement)
            if statement in self.kept:
                continue
            name = f"{self.prefix}_whole_{len(self.calls)}"
            if self.random and (sampled := latents.find(made, self._named, self._uses)):
                length, sampling, z = sampled
                found, becomes = latents.rewritten(made[-length:], sampling, z, name), (str(sampling), "reparameterize")
                self.calls[name] = latents.call(sampling)
            elif attended := attention_calls.find(made, self._named, self._module, self._uses):
                length, attention = attended
                found = attention_calls.rewritten(made[-length:], attention, name)
                becomes = (str(attention), "causal_attention")
                self.calls[name] = attention_calls.call(attention, self.random)
                self.calls[f"{name}_ready"] = attention_calls.ready
            else:
                continue
            self.notes.append(becomes)
            self.kept |= set(made[-length:])
            made[-length:] = found
        return made

    def _uses(self, name: str) -> int:
        return self.uses.get(name, 0)

    def _module(self, node: ast.expr) -> nn.Module | None:
        """The child that self.a is now."""
        return self._child(node) if self._path(node) else None

    def _joined(self, first: ast.stmt, second: ast.stmt) -> ast.stmt | None:
        """One statement that does both, if a step's result is only used as what the second one computes first."""
        name = _target(first)
        if name not in self.variables or self._step(first.value) is None or _loads(second, name) != 1:
            return None
        rebound = _target(second) == name or isinstance(second, ast.Return)
        if not rebound and (self.uses[name] != 2 or name in self.parameters or _target(second) is None):
            return None
        slot = self._first(second.value, name)
        if slot is None:
            return None
        whole = copy.copy(second)
        whole.value = _Replace(slot, first.value).visit(second.value)
        return whole

    def _first(self, node: ast.expr | None, name: str, within: bool = False) -> ast.Name | None:
        """The variable, where it is a step's input and nothing but plain reads is evaluated before."""
        if isinstance(node, ast.Name):
            return node if within and node.id == name else None
        if step := self._step(node):
            return self._first(step.given, name, True)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
            return self._first(node.func.value, name, True)
        parts: list[ast.expr] = []
        if isinstance(node, ast.BinOp):
            parts = [node.left, node.right]
        elif isinstance(node, (ast.Tuple, ast.List)):
            parts = node.elts
        elif isinstance(node, ast.Call) and self._global(node.func) is not None:
            parts = node.args
        for part in parts:
            variable = isinstance(part, ast.Name) and part.id in self.variables  # others may see a global one change
            if not variable and not isinstance(part, ast.Constant):
                return self._first(part, name)
        return None

    # --- a chain becomes a call

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = self._global(node.func)
        if rotary_calls.rotary_of(function) is not None:
            return self._handed(node, "rotary", rotary_calls.call, (rotary_calls.describe(function), "rotary"))
        if function in functions.SERVED:
            note = (f"{function.__name__}()", f"{function.__name__} where it is faster")
            return self._handed(node, function.__name__, functions.instead_of(function), note)
        steps, given = self._steps(node)
        chain = Chain(tuple(step.name for step, _ in steps), tuple(step.module for step, _ in steps))
        if not _is_worth(chain, self.random):
            return self.generic_visit(node)
        called = ast.Name(f"{self.prefix}_{len(self.chains)}", ast.Load())
        self.chains.append(chain)
        # What is called is looked up at every call, but for a tensor's methods.
        children = [call.func for step, call in steps if isinstance(step.name, str) or step.name.function]
        return ast.copy_location(ast.Call(called, [self.visit(given), *children], []), node)

    def _handed(self, node: ast.Call, name: str, call: Callable[..., Any], note: tuple[str, str]) -> ast.AST:
        """A function is handed, with its arguments, to what decides at every call."""
        name = f"{self.prefix}_{name}"
        self.calls[name] = call
        self.notes.append(note)
        whole = self.generic_visit(node)
        return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), [node.func, *node.args], node.keywords), whole)

    def _steps(self, node: ast.expr) -> tuple[list[tuple[_Step, ast.expr]], ast.expr]:
        """The steps that end with this call, each with its call, and what the first is given."""
        steps: list[tuple[_Step, ast.expr]] = []
        while step := self._step(node):
            steps.insert(0, (step, node))
            node = step.given
        return steps, node

    def _joins(self, node: ast.expr) -> bool:
        modules = tuple(step.module for step, _ in self._steps(node)[0])
        return _is_worth(Chain((), modules), self.random)

    def _step(self, node: ast.expr | None) -> _Step | None:
        if not isinstance(node, ast.Call) or any(isinstance(a, ast.Starred) for a in node.args):
            return None
        path = self._path(node.func)
        if path and (child := self._child(node.func)) is not None:
            alone = len(node.args) == 1 and not node.keywords
            return _Step(node.args[0], path, child) if alone else None
        function, method = (self._global(node.func) if node.args else None), ""
        make = _FUNCTIONS.get(function)
        if make is not None:
            given, settings = node.args[0], node.args[1:]
        elif isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
            function, method, given, settings = None, node.func.attr, node.func.value, node.args
            make = _METHODS[method]
            before = self._step(given)
            if before is None or letter(before.module) == ".":
                return None  # it may not be a tensor
        else:
            return None
        try:
            constants = tuple(map(ast.literal_eval, settings))
            named = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
            module = make(*constants, **named)
        except (ValueError, TypeError):  # a setting that is no constant, or none of the function
            return None
        return _Step(given, Called(module, function, method, constants, named), module)

    def _named(self, node: ast.expr) -> Any:
        """What a dotted name is in the module of the method; None if it is none."""
        if isinstance(node, ast.Name):
            return None if node.id in self.bound else self.globals.get(node.id)
        owner = self._named(node.value) if isinstance(node, ast.Attribute) else None
        return vars(owner).get(node.attr) if isinstance(owner, types.ModuleType) else None

    def _global(self, node: ast.expr) -> Any:
        """The function that a dotted name is; None if it is none."""
        found = self._named(node)
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

    # --- where statements are, and where nothing is looked for

    def visit_If(self, node: ast.If | ast.For | ast.While | ast.With) -> ast.AST:
        bodies = {name: self._body(getattr(node, name)) for name in ("body", "orelse") if hasattr(node, name)}
        for name in bodies:
            setattr(node, name, [])
        node = self.generic_visit(node)
        for name, body in bodies.items():
            setattr(node, name, body)
        return node

    visit_For = visit_While = visit_If

    def visit_With(self, node: ast.With) -> ast.AST:
        before = self.swallows
        opened = (item.context_expr for item in node.items)
        managers = (self._named(x.func) if isinstance(x, ast.Call) else None for x in opened)
        self.swallows |= not all((getattr(m, "__module__", None) or "").startswith("torch.") for m in managers)
        try:
            return self.visit_If(node)
        finally:
            self.swallows = before

    def visit_Try(self, node: ast.Try) -> ast.AST:
        return node  # a handler may see what is in between

    visit_TryStar = visit_Try

    def visit_FunctionDef(self, node: ast.AST) -> ast.AST:
        return node  # its arguments may hide self

    visit_AsyncFunctionDef = visit_ClassDef = visit_Lambda = visit_FunctionDef


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.new if node is self.old else node


def _target(statement: ast.stmt) -> str | None:
    """The one variable that the statement assigns to."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    return statement.targets[0].id if isinstance(statement.targets[0], ast.Name) else None


def _loads(statement: ast.stmt, name: str) -> int:
    return sum(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in ast.walk(statement))


def written(model: nn.Module, function: Any, random: bool = True) -> Written:
    """A method of the model's class, with its chains as calls. Raises Refused: why it stays as it is."""
    if not isinstance(function, types.FunctionType):
        raise Refused("it is no plain function")
    function, around = unwrapped(function)
    source = source_of(function)
    source = source._replace(definition=copy.deepcopy(source.definition))
    rewriter = _Rewriter(model, function, source.definition, random)
    if not rewriter.chains and not rewriter.calls:
        raise NothingFound(NOTHING_HERE)
    if not around:
        look_first(source.definition, rewriter.prefix)
    return Written(
        function, around, source, rewriter.prefix, tuple(rewriter.chains), rewriter.calls, tuple(rewriter.notes), random
    )


def methods(model: nn.Module, cls: type[nn.Module], named: Set[str]) -> Iterator[tuple[str, Any]]:
    """forward, and the other methods of the model's class that name one of its children, or one of these."""
    yield "forward", cls.forward
    for name in dict.fromkeys(name for base in cls.__mro__ for name in vars(base)):
        function = inspect.getattr_static(cls, name)
        if name == "forward" or name.startswith("__") or name in model.__dict__:
            continue
        if not isinstance(function, types.FunctionType):
            continue
        if (function.__module__ or "").startswith(("torch.", "genai_fast.")):
            continue
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is not None and not (model._modules.keys() | named).isdisjoint(code.co_names):
            yield name, function
