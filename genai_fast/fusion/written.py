"""Hand-written methods, compiled again with their chains as one call each (`rewrite` finds them).

Everything else of a method stays what it was: its branches, loops, flags and names are compiled from the same source
into the same code, so nothing is frozen.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Set
from typing import Any, NamedTuple

import torch
from torch import nn

from genai_fast.fusion.chains import obstacle, watched
from genai_fast.fusion.explanation import NOTHING_HERE
from genai_fast.fusion.rewrite import Rewriter
from genai_fast.fusion.run import Pending, begin, end, run
from genai_fast.fusion.source import NothingFound, Refused, Source, remade, source_of, unwrapped, wrapped
from genai_fast.fusion.steps import Called, Chain, Sum


def _look(steps: tuple[Any, ...], modules: tuple[nn.Module, ...], called: tuple[Any, ...], x: Any) -> Any:
    """The modules of these steps as they are now, or None if they must be called; and what to call."""
    given, calls, found = iter(called), [], []
    usual = not (isinstance(x, torch.fx.Proxy) or watched())
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


def _calls(chain: Chain, random: bool) -> dict[str, Callable[..., Any]]:
    """By suffix: run on the chain, or on its halves; what it calls comes along, as it is looked up at every call."""
    steps, modules, quiet = chain
    sums = [k for k, step in enumerate(steps) if isinstance(step, Sum)]

    def run_chain(x: Any, *called: Any) -> Any:
        found, calls = _look(steps, modules, called, x)
        return _one_by_one(steps, calls, x) if found is None else run(found, x, random)

    if not sums:
        return {"": run_chain}
    (at,) = sums
    how, before, after = steps[at], (steps[:at], modules[:at]), (steps[at + 1 :], modules[at + 1 :])

    def begin_chain(x: Any, *called: Any) -> Any:
        found, calls = _look(*before, called, x)
        return _one_by_one(before[0], calls, x) if found is None else begin(found, x, quiet, random)

    def end_chain(first: Any, second: Any, *called: Any) -> Any:
        y, residual = (second, first) if how.left else (first, second)
        if not how.usual and isinstance(y, Pending):
            y = run(y.modules, y.x)
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


class Written(NamedTuple):
    """A method made again: its source, and the chains that run as one."""

    function: types.FunctionType  # within its decorators
    around: list[types.FunctionType]  # their wrappers, from inside out
    source: Source
    prefix: str
    chains: tuple[Chain, ...]
    others: dict[str, Callable[..., Any]]  # more that is called in the method, by name
    notes: tuple[tuple[str, str], ...]  # what these were, and what they are now
    random: bool  # whether it may draw other numbers than PyTorch's

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for methods of one class that are the same."""
        steps = (repr((chain.steps, chain.quiet)) for chain in self.chains)
        return *self.around, self.function, self.function.__code__, self.random, *steps, *self.others, *self.notes

    def compile(self, replacement: Callable[[], Any]) -> types.FunctionType:
        """The method; it calls what `replacement` returns in its place, unless that is None."""
        old = self.function
        calls: dict[str, Any] = {
            f"{self.prefix}_{k}{part}": call
            for k, chain in enumerate(self.chains)
            for part, call in _calls(chain, self.random).items()
        }
        calls |= self.others
        calls[f"{self.prefix}_now"], calls[f"{self.prefix}_replacement"] = replacement, _passed_on(old, replacement)
        code = self.source.compile(old, *calls).replace(co_qualname=old.__code__.co_qualname)
        cells = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
        closure = tuple(cells[n] if n in cells else types.CellType(calls[n]) for n in code.co_freevars)
        new = remade(old, code, closure)
        return _looking_first(wrapped(new, self.around), replacement) if self.around else new


def _looking_first(function: types.FunctionType, replacement: Callable[[], Any]) -> types.FunctionType:
    """A decorated method that begins with a look at what it has been replaced by on its class."""

    @functools.wraps(function)
    def look_first(*args: Any, **named: Any) -> Any:
        now = replacement()
        return function(*args, **named) if now is None else now(*args, **named)

    return look_first


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
    function, around = unwrapped(function)
    source = source_of(function)
    source = source._replace(definition=copy.deepcopy(source.definition))
    rewriter = Rewriter(model, function, source.definition, random)
    if not rewriter.chains and not rewriter.calls:
        raise NothingFound(NOTHING_HERE)
    if not around:
        _look_first(source.definition, rewriter.prefix)
    found = tuple(rewriter.chains), rewriter.calls, tuple(rewriter.notes)
    return Written(function, around, source, rewriter.prefix, *found, random)


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
