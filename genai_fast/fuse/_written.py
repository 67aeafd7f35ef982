"""Methods that somebody wrote: chains of calls in their source are found, and compiled again as one call each.

Everything else of a method stays what it was: its branches, loops, flags and names are compiled from the same source
into the same code, so nothing is frozen. A chain is what calls children and activations on one another's results:
nested in one expression, or by statements in a row, where nothing else can see what is in between.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.layers._run import run
from genai_fast.layers._stock import letter, runs

_SEE_ALL = {"locals", "vars", "eval", "exec"}  # who calls these may look at any variable


class Refused(Exception):
    """Why a method is left alone."""


class NothingFound(Refused):
    """There is nothing to run as one."""


class Chain(NamedTuple):
    """Steps that follow each other: the path of a child, or an activation that is called as a function."""

    steps: tuple[str | nn.Module, ...]
    modules: tuple[nn.Module, ...]


def _relu(inplace: bool = False) -> nn.Module:
    return nn.ReLU(inplace)


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> nn.Module:
    return nn.LeakyReLU(negative_slope, inplace)


def _silu(inplace: bool = False) -> nn.Module:
    return nn.SiLU(inplace)


def _gelu(approximate: str = "none") -> nn.Module:
    return nn.GELU(approximate)


_FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    F.relu: _relu, F.leaky_relu: _leaky_relu, F.silu: _silu, F.gelu: _gelu, torch.relu: lambda: nn.ReLU(),
    **dict.fromkeys((F.tanh, torch.tanh), nn.Tanh), **dict.fromkeys((F.sigmoid, torch.sigmoid), nn.Sigmoid),
}  # fmt: skip
_METHODS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(), "relu_": lambda: nn.ReLU(True), "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
}  # fmt: skip


class _Step(NamedTuple):
    """A call of one module or activation on one value."""

    given: ast.expr
    name: str | nn.Module
    module: nn.Module


class _Rewriter(ast.NodeTransformer):
    """Puts one call in the place of each chain that holds something to run as one."""

    def __init__(self, model: nn.Module, function: types.FunctionType, definition: ast.FunctionDef) -> None:
        arguments = definition.args.posonlyargs + definition.args.args
        if not arguments:
            raise Refused("it takes no self")
        self.model, self.self, self.globals = model, arguments[0].arg, function.__globals__
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
        definition.body = self._body(definition.body)

    # --- statements in a row become one expression

    def _body(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        joined: list[ast.stmt] = []
        for statement in statements:
            if joined and (whole := self._joined(joined[-1], statement)):
                joined[-1] = whole
            else:
                joined.append(statement)
        return [self.visit(statement) for statement in joined]

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
            if not isinstance(part, (ast.Name, ast.Constant)):
                return self._first(part, name)
        return None

    # --- a chain becomes a call

    def visit_Call(self, node: ast.Call) -> ast.AST:
        steps, given = [], node
        while step := self._step(given):
            steps.insert(0, (step, given))
            given = step.given
        chain = Chain(tuple(step.name for step, _ in steps), tuple(step.module for step, _ in steps))
        cut = runs("".join([letter(module) for module in chain.modules]))
        if not any(r.fused and r.letters.strip("CAa") for r in cut):  # for convolutions alone nothing is replaced
            return self.generic_visit(node)
        called = ast.Name(f"{self.prefix}_{len(self.chains)}", ast.Load())
        self.chains.append(chain)
        children = [call.func for step, call in steps if isinstance(step.name, str)]
        return ast.copy_location(ast.Call(called, [self.visit(given), *children], []), node)

    def _step(self, node: ast.expr | None) -> _Step | None:
        if not isinstance(node, ast.Call) or any(isinstance(a, ast.Starred) for a in node.args):
            return None
        path = self._path(node.func)
        if path and (child := self._child(node.func)) is not None:
            alone = len(node.args) == 1 and not node.keywords
            return _Step(node.args[0], path, child) if alone else None
        make = _FUNCTIONS.get(self._global(node.func)) if node.args else None
        if make is not None:
            given, settings = node.args[0], node.args[1:]
        elif isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
            given, settings, make = node.func.value, node.args, _METHODS[node.func.attr]
            before = self._step(given)
            if before is None or letter(before.module) == ".":
                return None  # nobody knows whether this is a tensor
        else:
            return None
        try:
            module = make(*map(ast.literal_eval, settings), **{k.arg: ast.literal_eval(k.value) for k in node.keywords})
        except (ValueError, TypeError):  # a setting that is no constant, or none of the function
            return None
        return _Step(given, module, module)

    def _global(self, node: ast.expr) -> Any:
        """The function that a dotted name is in the module of the method; None if it is none."""
        if isinstance(node, ast.Name):
            found = None if node.id in self.bound else self.globals.get(node.id)
        elif isinstance(node, ast.Attribute):
            owner = self._global(node.value)
            found = getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType) else None
        else:
            found = None
        return found if isinstance(found, (types.ModuleType, types.FunctionType, types.BuiltinFunctionType)) else None

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

    visit_For = visit_While = visit_With = visit_If

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


def _call(chain: Chain) -> Callable[..., Any]:
    """run on the chain, whose children come as arguments: they are looked up at every call."""
    functions = tuple(None if isinstance(step, str) else step for step in chain.steps)

    def run_chain(x: Any, *children: nn.Module) -> Any:
        given = iter(children)
        modules = [next(given) if function is None else function for function in functions]
        if isinstance(x, torch.fx.Proxy):  # a tracer knows the children, but not the functions that became modules
            for module, function in zip(modules, functions, strict=True):
                x = module(x) if function is None else function.forward(x)
            return x
        return run(modules, x)

    return run_chain


class _Source(NamedTuple):
    """Of a method: its definition, at its lines in its file, and the imports of that file's top level."""

    definition: ast.FunctionDef
    imports: list[ast.stmt]

    def compile(self, function: types.FunctionType, *names: str) -> types.CodeType:
        """In a scope that has the variables around the method and these names. The imports are never executed: the
        compiler makes other code of `F.relu` where it sees that F was imported."""
        around = [ast.arg(name) for name in (*function.__code__.co_freevars, *names)]
        outer = ast.FunctionDef("around", ast.arguments([], around, None, [], [], None, []), [self.definition], [])
        module = ast.Module([*self.imports, ast.copy_location(outer, self.definition)], [])
        code = compile(ast.fix_missing_locations(module), function.__code__.co_filename, "exec", dont_inherit=True)
        for name in ("around", self.definition.name):
            code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
        return code


@functools.lru_cache(256)
def _source(function: types.FunctionType) -> _Source:
    if hasattr(function, "__wrapped__"):
        raise Refused("it is decorated")
    try:
        file, _ = inspect.findsource(function)
        lines, first = inspect.getsourcelines(function)
        indented = lines[0][:1].isspace()  # and stays so: what a string holds must not change
        tree = ast.parse("".join(["if True:\n"] * indented + lines))
        definition = (tree.body[0] if indented else tree).body[0]
        imports = list(_imports(ast.parse("".join(file))))
    except (OSError, TypeError, SyntaxError):
        raise Refused("its source cannot be read") from None
    if not isinstance(definition, ast.FunctionDef):
        raise Refused("it is no plain function")
    if definition.decorator_list:
        raise Refused("it is decorated")
    ast.increment_lineno(definition, first - 1 - indented)
    source = _Source(definition, imports)
    if not _same(source.compile(function), function.__code__):
        raise Refused("its source is not what runs")
    return source


def _imports(node: ast.AST) -> Iterator[ast.stmt]:
    """The imports of a module's own scope, those under an if or a try too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
            yield from _imports(child)


def _same(a: Any, b: Any) -> bool:
    """Whether two code objects do the same, wherever they stand."""
    if not isinstance(a, types.CodeType):
        return type(a) is type(b) and (a == b or a != a)
    if not isinstance(b, types.CodeType) or len(a.co_consts) != len(b.co_consts):
        return False
    parts = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_kwonlyargcount")
    return all(getattr(a, p) == getattr(b, p) for p in parts) and all(map(_same, a.co_consts, b.co_consts))


class Written(NamedTuple):
    """A method made again: its source, and the chains that run as one."""

    function: types.FunctionType
    source: _Source
    prefix: str
    chains: tuple[Chain, ...]

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for methods of one class that are the same."""
        return ast.unparse(self.source.definition), *(repr(chain.steps) for chain in self.chains)

    def compile(self) -> types.FunctionType:
        old = self.function
        calls = {f"{self.prefix}_{k}": _call(chain) for k, chain in enumerate(self.chains)}
        code = self.source.compile(old, *calls)
        cells = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
        closure = tuple(cells[n] if n in cells else types.CellType(calls[n]) for n in code.co_freevars)
        new = types.FunctionType(code, old.__globals__, old.__name__, old.__defaults__, closure)
        for name in ("__kwdefaults__", "__annotations__", "__doc__", "__module__", "__qualname__"):
            setattr(new, name, getattr(old, name))
        new.__dict__.update(old.__dict__)
        return new


def written(model: nn.Module, function: Any) -> Written:
    """A method of the model's class, with its chains as calls.

    Raises:
        Refused: why it stays as it is.
    """
    if not isinstance(function, types.FunctionType):
        raise Refused("it is no plain function")
    source = _source(function)
    source = source._replace(definition=copy.deepcopy(source.definition))
    rewriter = _Rewriter(model, function, source.definition)
    if not rewriter.chains:
        raise NothingFound("it calls no batch norm or dropout itself, in a row of single uses")
    return Written(function, source, rewriter.prefix, tuple(rewriter.chains))


def methods(model: nn.Module, cls: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """forward, and the other methods of the model's class that name one of its children."""
    yield "forward", cls.forward
    for name in dict.fromkeys(name for base in cls.__mro__ for name in vars(base)):
        function = inspect.getattr_static(cls, name)
        if name == "forward" or name.startswith("__") or name in model.__dict__:
            continue
        if not isinstance(function, types.FunctionType):
            continue
        if (function.__module__ or "").startswith(("torch.", "genai_fast.")):
            continue
        if not model._modules.keys().isdisjoint(inspect.unwrap(function).__code__.co_names):
            yield name, function
