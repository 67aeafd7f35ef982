"""A method made again: its source with some calls replaced, compiled to what takes its place."""

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from genai_fast.fusion.chains import obstacle, watched
from genai_fast.fusion.run import run
from genai_fast.fusion.source import Source, remade, wrapped


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


def _call(chain: Chain, random: bool) -> Callable[..., Any]:
    """run on the chain; what it calls comes along, as it is looked up at every call."""
    steps = tuple(None if isinstance(step, str) else step for step in chain.steps)

    def run_chain(x: Any, *called: Any) -> Any:
        given = iter(called)
        modules = []
        usual = not (isinstance(x, torch.fx.Proxy) or watched())
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
        steps = (repr(chain.steps) for chain in self.chains)
        return *self.around, self.function, self.function.__code__, self.random, *steps, *self.others, *self.notes

    def compile(self, replacement: Callable[[], Any]) -> types.FunctionType:
        """The method; it calls what `replacement` returns in its place, unless that is None."""
        old = self.function
        calls: dict[str, Any] = {f"{self.prefix}_{k}": _call(chain, self.random) for k, chain in enumerate(self.chains)}
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


def look_first(definition: ast.FunctionDef, prefix: str) -> None:
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
