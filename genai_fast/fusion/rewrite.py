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

from genai_fast.fusion import latents
from genai_fast.fusion.chains import global_hooks, letter, obstacle, spans
from genai_fast.fusion.explanation import NOTHING_HERE
from genai_fast.fusion.functions import SERVED
from genai_fast.fusion.run import run
from genai_fast.fusion.source import NothingFound, Refused, Source, source_of
from genai_fast.ops.dispatch import left_to_torch

_SEE_ALL = {"locals", "vars", "eval", "exec"}  # who calls these may look at any variable


class Called(NamedTuple):
    """An activation that is called as a function, or as a method of a tensor (function is None then)."""

    module: nn.Module
    function: Any
    method: str
    settings: tuple[Any, ...]
    named: dict[str, Any]

    def __str__(self) -> str:
        return f"{type(self.module).__name__}()"


class Chain(NamedTuple):
    """Steps that follow each other: paths of children, and activations."""

    steps: tuple[str | Called, ...]
    modules: tuple[nn.Module, ...]


# The constructors take what the functions do, except for torch.relu.
_FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    F.relu: nn.ReLU, F.leaky_relu: nn.LeakyReLU, F.silu: nn.SiLU, F.gelu: nn.GELU, torch.relu: lambda: nn.ReLU(),
    **dict.fromkeys((F.tanh, torch.tanh), nn.Tanh), **dict.fromkeys((F.sigmoid, torch.sigmoid), nn.Sigmoid),
}  # fmt: skip
_METHODS = {"relu": lambda: nn.ReLU(), "relu_": lambda: nn.ReLU(True), "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class _Step(NamedTuple):
    """A call of one module or activation on one value."""

    given: ast.expr
    name: str | Called
    module: nn.Module


class _Rewriter(ast.NodeTransformer):
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
        self.samplings: list[latents.Sampling] = []
        self.functions: list[Callable[..., Any]] = []
        self.kept: set[ast.stmt] = set()  # what a sampling falls back on
        self.swallows = False  # whether exceptions may be caught here, so that later code sees intermediate values
        definition.body = self._body(definition.body)

    # --- statements in a row become one expression

    def _body(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        if self.swallows:
            return [self.visit(statement) for statement in statements]
        joined: list[ast.stmt] = []
        for statement in self._drawn(statements):
            if joined and (whole := self._joined(joined[-1], statement)):
                joined[-1] = whole
            else:
                joined.append(statement)
        return [self.visit(statement) for statement in joined]

    def _drawn(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """The statements, with a call before those that sample latents."""
        made: list[ast.stmt] = []
        for statement in statements:
            made.append(statement)
            if statement in self.kept or not self.random:
                continue
            found = latents.find(made, self._named, lambda name: self.uses.get(name, 0))
            if found is not None:
                length, sampling, z = found
                call = f"{self.prefix}_sample_{len(self.samplings)}"
                self.samplings.append(sampling)
                self.kept |= set(made[-length:])
                made[-length:] = latents.rewritten(made[-length:], sampling, z, call)
        return made

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
        steps, given = [], node
        while step := self._step(given):
            steps.insert(0, (step, given))
            given = step.given
        chain = Chain(tuple(step.name for step, _ in steps), tuple(step.module for step, _ in steps))
        cut = spans("".join([letter(module, self.random) for module in chain.modules]))
        if not any(r.fused and r.letters.strip("CAaI") for r in cut):  # for convolutions alone nothing is replaced
            return self._served(node)
        called = ast.Name(f"{self.prefix}_{len(self.chains)}", ast.Load())
        self.chains.append(chain)
        # What is called is looked up at every call, but for a tensor's methods.
        children = [call.func for step, call in steps if isinstance(step.name, str) or step.name.function]
        return ast.copy_location(ast.Call(called, [self.visit(given), *children], []), node)

    def _served(self, node: ast.Call) -> ast.AST:
        """A function that an op serves is handed to what decides, at every call."""
        served = SERVED.get(self._global(node.func))
        node = self.generic_visit(node)
        if served is None:
            return node
        call = f"{self.prefix}_function_{len(self.functions)}"
        self.functions.append(served)
        return ast.copy_location(ast.Call(ast.Name(call, ast.Load()), [node.func, *node.args], node.keywords), node)

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


def _call(chain: Chain, random: bool) -> Callable[..., Any]:
    """run on the chain; what it calls comes along, as it is looked up at every call."""
    steps = tuple(None if isinstance(step, str) else step for step in chain.steps)

    def run_chain(x: Any, *called: Any) -> Any:
        given = iter(called)
        modules = []
        usual = not (isinstance(x, torch.fx.Proxy) or _watched())
        for step in steps:
            now = step.function if step is not None and step.function is None else next(given)
            usual &= step is None or (now is step.function and not obstacle(step.module))
            modules.append(now if step is None else step.module)
        if usual:
            return run(modules, x, random)
        called = iter(called)
        for step in steps:
            if step is None:
                x = next(called)(x)
            elif step.function is None:
                x = getattr(x, step.method)(*step.settings, **step.named)
            else:
                x = next(called)(x, *step.settings, **step.named)
        return x

    return run_chain


def _instead(served: Callable[..., Any]) -> Callable[..., Any]:
    """Calls it in the place of the function that it serves, unless that has been replaced."""
    own = next(function for function, serves in SERVED.items() if serves is served)

    def call(now: Any, *args: Any, **named: Any) -> Any:
        return (served if now is own and not _watched() else now)(*args, **named)

    return call


def _passed_on(function: types.FunctionType, replacement: Callable[[], Any]) -> Callable[..., Any]:
    """Calls the replacement as the function was called, which has filled in its defaults."""
    defaults, named_defaults = function.__defaults__ or (), function.__kwdefaults__ or {}
    count = function.__code__.co_argcount

    def call(*args: Any, **named: Any) -> Any:
        while count - len(defaults) < len(args) <= count and args[-1] is defaults[len(args) - count - 1]:
            args = args[:-1]
        given = {k: v for k, v in named.items() if k not in named_defaults or v is not named_defaults[k]}
        return replacement()(*args, **given)

    return call


def _watched() -> bool:
    """Whether the calls are followed: a tracer and a mode know children and functions, and hooks see only those."""
    if torch.compiler.is_compiling():
        return False
    tracing = torch.fx._symbolic_trace.is_fx_symbolic_tracing()  # is_fx_tracing() logs a warning
    return global_hooks() or tracing or left_to_torch()


class Written(NamedTuple):
    """A method made again: its source, and the chains that run as one."""

    function: types.FunctionType
    source: Source
    prefix: str
    chains: tuple[Chain, ...]
    samplings: tuple[latents.Sampling, ...]
    functions: tuple[Callable[..., Any], ...]  # that serve those which it calls
    random: bool  # whether it may draw other numbers than PyTorch's

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for methods of one class that are the same."""
        chains = (repr(chain.steps) for chain in self.chains)
        return self.function, self.function.__code__, self.random, *chains, len(self.samplings), *self.functions

    @property
    def calls(self) -> list[tuple[str, str]]:
        """What it does in one call beside the chains, and by which op."""
        served = [(f.__name__, f"{f.__name__} where it is faster") for f in self.functions]
        return [*((str(s), "reparameterize") for s in self.samplings), *served]

    def compile(self, replacement: Callable[[], Any]) -> types.FunctionType:
        """The method; it calls what `replacement` returns in its place, unless that is None."""
        old = self.function
        calls: dict[str, Any] = {f"{self.prefix}_{k}": _call(chain, self.random) for k, chain in enumerate(self.chains)}
        calls |= {f"{self.prefix}_sample_{k}": latents.call(s, _watched) for k, s in enumerate(self.samplings)}
        calls |= {f"{self.prefix}_function_{k}": _instead(f) for k, f in enumerate(self.functions)}
        calls[f"{self.prefix}_now"], calls[f"{self.prefix}_replacement"] = replacement, _passed_on(old, replacement)
        code = self.source.compile(old, *calls).replace(co_qualname=old.__code__.co_qualname)
        cells = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
        closure = tuple(cells[n] if n in cells else types.CellType(calls[n]) for n in code.co_freevars)
        new = types.FunctionType(code, old.__globals__, old.__name__, old.__defaults__, closure)
        for name in ("__kwdefaults__", "__annotations__", "__doc__", "__module__", "__qualname__"):
            setattr(new, name, getattr(old, name))
        new.__dict__.update(old.__dict__)
        return new


def _look_first(definition: ast.FunctionDef, prefix: str) -> None:
    """Begin the method with a look at what it has been replaced by on its class."""
    args = definition.args
    given = [a.arg for a in (*args.posonlyargs, *args.args)]
    given += [f"*{args.vararg.arg}"] if args.vararg else []
    given += [f"{a.arg}={a.arg}" for a in args.kwonlyargs]
    given += [f"**{args.kwarg.arg}"] if args.kwarg else []
    yields = any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in ast.walk(definition))
    call = f"{prefix}_replacement({', '.join(given)})"
    look = ast.parse(f"if {prefix}_now() is not None: return {f'(yield from {call})' if yields else call}").body[0]
    documented = ast.get_docstring(definition, clean=False) is not None
    definition.body.insert(documented, ast.increment_lineno(look, definition.lineno - 1))


def written(model: nn.Module, function: Any, random: bool = True) -> Written:
    """A method of the model's class, with its chains as calls. Raises Refused: why it stays as it is."""
    if not isinstance(function, types.FunctionType):
        raise Refused("it is no plain function")
    source = source_of(function)
    source = source._replace(definition=copy.deepcopy(source.definition))
    rewriter = _Rewriter(model, function, source.definition, random)
    if not (rewriter.chains or rewriter.samplings or rewriter.functions):
        raise NothingFound(NOTHING_HERE)
    _look_first(source.definition, rewriter.prefix)
    found = tuple(rewriter.chains), tuple(rewriter.samplings), tuple(rewriter.functions)
    return Written(function, source, rewriter.prefix, *found, random)


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
