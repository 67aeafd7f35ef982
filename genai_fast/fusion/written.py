"""Hand-written methods, compiled again with their chains as one call each (`rewrite` finds them).

Everything else of a method stays what it was: its branches, loops, flags and names are compiled from the same source
into the same code, so nothing is frozen.
"""

from __future__ import annotations

import ast
import copy
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from genai_fast.fusion.chains import global_hooks, obstacle
from genai_fast.fusion.explanation import NOTHING_HERE
from genai_fast.fusion.rewrite import Rewriter
from genai_fast.fusion.run import Pending, begin, end, run
from genai_fast.fusion.source import NothingFound, Refused, Source, source_of
from genai_fast.fusion.steps import Called, Chain, Sum
from genai_fast.ops.dispatch import left_to_torch


def _look(steps: tuple[Any, ...], modules: tuple[nn.Module, ...], called: tuple[Any, ...], x: Any) -> Any:
    """The modules of these steps as they are now, or None if they must be called; and what to call."""
    given, calls, found = iter(called), [], []
    usual = not (isinstance(x, torch.fx.Proxy) or _watched())
    for step, module in zip(steps, modules, strict=True):
        now = step.function if isinstance(step, Called) and step.function is None else next(given)
        named = isinstance(step, str)
        usual &= named or (now is step.function and not obstacle(module))
        calls.append(now)
        found.append(now if named else module)
    return found if usual else None, calls


def _one_by_one(steps: tuple[Any, ...], calls: list[Any], x: Any) -> Any:
    for step, now in zip(steps, calls, strict=True):
        if isinstance(step, str):
            x = now(x)
        elif step.function is None:
            x = getattr(x, step.method)(*step.settings, **step.named)
        else:
            x = now(x, *step.settings, **step.named)
    return x


def _calls(chain: Chain) -> dict[str, Callable[..., Any]]:
    """By suffix: run on the chain, or on its halves; what it calls comes along, as it is looked up at every call."""
    steps, modules, quiet = chain
    sums = [k for k, step in enumerate(steps) if isinstance(step, Sum)]

    def run_chain(x: Any, *called: Any) -> Any:
        found, calls = _look(steps, modules, called, x)
        return _one_by_one(steps, calls, x) if found is None else run(found, x)

    if not sums:
        return {"": run_chain}
    (at,) = sums
    how, before, after = steps[at], (steps[:at], modules[:at]), (steps[at + 1 :], modules[at + 1 :])

    def begin_chain(x: Any, *called: Any) -> Any:
        found, calls = _look(*before, called, x)
        return _one_by_one(before[0], calls, x) if found is None else begin(found, x, quiet)

    def end_chain(first: Any, second: Any, *called: Any) -> Any:
        y, residual = (second, first) if how.left else (first, second)
        found, calls = _look(*after, called, residual)
        if isinstance(y, Pending):
            if found is not None:
                return end(y, residual, how, found[0] if found else None)
            y = run(y.modules, y.x)
        return _one_by_one(after[0], calls, how(y, residual))

    return {"_begin": begin_chain, "_end": end_chain}


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

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for methods of one class that are the same."""
        return self.function, self.function.__code__, *(repr((chain.steps, chain.quiet)) for chain in self.chains)

    def compile(self, replacement: Callable[[], Any]) -> types.FunctionType:
        """The method; it calls what `replacement` returns in its place, unless that is None."""
        old = self.function
        calls: dict[str, Any] = {
            f"{self.prefix}_{k}{part}": call
            for k, chain in enumerate(self.chains)
            for part, call in _calls(chain).items()
        }
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


def written(model: nn.Module, function: Any) -> Written:
    """A method of the model's class, with its chains as calls. Raises Refused: why it stays as it is."""
    if not isinstance(function, types.FunctionType):
        raise Refused("it is no plain function")
    source = source_of(function)
    source = source._replace(definition=copy.deepcopy(source.definition))
    rewriter = Rewriter(model, function, source.definition)
    if not rewriter.chains:
        raise NothingFound(NOTHING_HERE)
    _look_first(source.definition, rewriter.prefix)
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
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is not None and not model._modules.keys().isdisjoint(code.co_names):
            yield name, function
