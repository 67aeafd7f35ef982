"""A VAE's sampling as people write it, mu + exp(logvar / 2) * noise, found in the source of a method.

The statements stay, for what the op does not take; before them stands a call that gives z, or None.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from genai_fast import ops
from genai_fast.backends import choose, forced_backend, is_plain
from genai_fast.fusion import thresholds
from genai_fast.fusion.chains import watched
from genai_fast.fusion.statements import Copying, target

NAMES = frozenset(("randn", "randn_like", "rsample"))  # one of which such a method's code has

_HALF = {("Mult", 0.5), ("Div", 2)}
_METHODS = {"mul": "Mult", "multiply": "Mult", "div": "Div", "add": "Add", "mul_": "Mult", "div_": "Div", "add_": "Add"}


class Sampling(NamedTuple):
    """Statements of a method that draw z."""

    mu: str
    logvar: str
    called: tuple[ast.expr, ...]  # as the source names them
    functions: tuple[Any, ...]  # what they were
    device: bool  # whether the noise is made on mu's device, and has its dtype; else the defaults
    dtype: bool

    def __str__(self) -> str:
        return f"{self.mu} + exp({self.logvar} / 2) * noise"


class _Mismatch(Exception):
    pass


class _Pattern:
    """Matches one expression, with the variables that earlier statements assign."""

    def __init__(self, resolve: Callable[[ast.expr], Any], defined: dict[str, ast.expr]) -> None:
        self.resolve, self.defined = resolve, defined
        self.called: list[ast.expr] = []
        self.functions: list[Any] = []
        self.used: set[str] = set()
        self.device = self.dtype = True

    def _expanded(self, node: ast.expr) -> ast.expr:
        seen: set[str] = set()  # x = y; y = x
        while isinstance(node, ast.Name) and node.id in self.defined and node.id not in seen:
            seen.add(node.id)
            node = self.defined[node.id]
        self.used |= seen
        return node

    def _operands(self, node: ast.expr, kind: str, fresh: bool = False) -> list[ast.expr]:
        """Of a sum, product or quotient in any spelling; those in place only on what nothing else sees."""
        node = self._expanded(node)
        if isinstance(node, ast.BinOp) and type(node.op).__name__ == kind:
            return [node.left, node.right]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords:
            name, arguments = node.func.attr, node.args
            if self.resolve(node.func) is None and _METHODS.get(name) == kind and len(arguments) == 1:
                first = node.func.value
                if name.endswith("_") and not (fresh and (not isinstance(first, ast.Name) or first.id in self.defined)):
                    raise _Mismatch
                return [first, *arguments]
            own = {"Mult": torch.mul, "Div": torch.div, "Add": torch.add}[kind]
            if len(arguments) == 2 and self.resolve(node.func) is own:
                self._calls(node.func, own)
                return arguments
        raise _Mismatch

    def _calls(self, name: ast.expr, function: Any) -> None:
        self.called.append(name)
        self.functions.append(function)

    def _unary(self, node: ast.expr, function: Any, fresh: bool) -> ast.expr:
        """The argument of exp(x), x.exp() or, of what nothing else sees, x.exp_()."""
        node = self._expanded(node)
        if not isinstance(node, ast.Call) or node.keywords:
            raise _Mismatch
        if len(node.args) == 1 and self.resolve(node.func) is function:
            self._calls(node.func, function)
            return node.args[0]
        names = (function.__name__, f"{function.__name__}_")[: 2 if fresh else 1]
        if not node.args and isinstance(node.func, ast.Attribute) and node.func.attr in names:
            return node.func.value
        raise _Mismatch

    def _variable(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name) and node.id not in self.defined:
            return node.id
        raise _Mismatch

    def half(self, node: ast.expr) -> str:
        """v of v / 2."""
        node = self._expanded(node)
        for kind in ("Mult", "Div"):
            try:
                first, second = self._operands(node, kind)
            except _Mismatch:
                continue
            if kind == "Mult" and isinstance(first, ast.Constant):
                first, second = second, first
            if isinstance(second, ast.Constant) and (kind, second.value) in _HALF:
                return self._variable(first)
        raise _Mismatch

    def deviation(self, node: ast.expr) -> str:
        """v of exp(v / 2) or sqrt(exp(v))."""
        try:
            return self.half(self._unary(node, torch.exp, True))
        except _Mismatch:
            return self._variable(self._unary(self._unary(node, torch.sqrt, True), torch.exp, False))

    def noise(self, node: ast.expr, alike: Callable[[ast.expr], bool]) -> None:
        """randn_like(x) or randn(x.shape, ...), where x has z's shape."""
        node = self._expanded(node)
        if not isinstance(node, ast.Call) or not node.args:
            raise _Mismatch
        function, first = self.resolve(node.func), node.args[0]
        if function is torch.randn_like and len(node.args) == 1 and not node.keywords and alike(first):
            return self._calls(node.func, function)
        if function is not torch.randn or len(node.args) != 1:
            raise _Mismatch
        first = first.value if isinstance(first, ast.Starred) else first
        if isinstance(first, ast.Call) and not first.args and not first.keywords:
            first, wanted = first.func, "size"
        else:
            wanted = "shape"
        if not isinstance(first, ast.Attribute) or first.attr != wanted or not alike(first.value):
            raise _Mismatch
        given = {k.arg: k.value for k in node.keywords}
        for name, value in given.items():
            if name not in ("device", "dtype") or not isinstance(value, ast.Attribute) or value.attr != name:
                raise _Mismatch
            if not alike(value.value):
                raise _Mismatch
        self.device, self.dtype = "device" in given, "dtype" in given
        return self._calls(node.func, function)

    def scaled_noise(self, first: ast.expr, second: ast.expr, mu: str) -> str:
        """logvar of noise * deviation, in either order."""
        for noise, deviation in ((first, second), (second, first)):
            called, functions = list(self.called), list(self.functions)
            try:
                logvar = self.deviation(deviation)
                self.noise(noise, lambda x: self._same(x, (mu, logvar), deviation))  # noqa: B023
                return logvar
            except _Mismatch:
                self.called, self.functions = called, functions
        raise _Mismatch

    def _same(self, x: ast.expr, names: Sequence[str], deviation: ast.expr) -> bool:
        if isinstance(x, ast.Name) and x.id in names:
            return True
        return ast.dump(self._expanded(x)) == ast.dump(self._expanded(deviation))

    def sample(self, node: ast.expr) -> tuple[str, str]:
        """mu and logvar of z."""
        node = self._expanded(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "rsample" and not node.args and not node.keywords:
                return self._distribution(node.func.value)
            if node.func.attr == "addcmul" and not node.keywords:
                own = self.resolve(node.func)
                parts = node.args if own is torch.addcmul else [node.func.value, *node.args]
                if len(parts) == 3 and own in (torch.addcmul, None):
                    if own is not None:
                        self._calls(node.func, own)
                    mu = self._variable(parts[0])
                    return mu, self.scaled_noise(parts[1], parts[2], mu)
        first, second = self._operands(node, "Add", True)
        for mean, product in ((first, second), (second, first)):
            try:
                mu = self._variable(mean)
                return mu, self.scaled_noise(*self._operands(product, "Mult", True), mu)
            except _Mismatch:
                continue
        raise _Mismatch

    def _distribution(self, node: ast.expr) -> tuple[str, str]:
        node = self._expanded(node)
        if not isinstance(node, ast.Call) or len(node.args) != 2 or node.keywords:
            raise _Mismatch
        if self.resolve(node.func) is not torch.distributions.Normal:
            raise _Mismatch
        self._calls(node.func, torch.distributions.Normal)
        return self._variable(node.args[0]), self.deviation(node.args[1])


def _place(statement: ast.stmt) -> list[ast.expr]:
    """Where z may stand in a statement so that nothing of it is computed before: all of it, or first arguments."""
    node = statement.value if isinstance(statement, (ast.Assign, ast.Return)) else None
    found: list[ast.expr] = []
    while node is not None:
        found.append(node)
        if isinstance(node, ast.Tuple) and node.elts:
            node = node.elts[0]
        elif isinstance(node, ast.Call) and node.args and not isinstance(node.args[0], ast.Starred):
            node = node.args[0]
        else:
            node = None
    return found


def find(
    statements: Sequence[ast.stmt], resolve: Callable[[ast.expr], Any], local: Callable[[str], int]
) -> tuple[int, Sampling, ast.expr] | None:
    """In the last statement of a body: how many statements make z, what they do, and the expression that is z.

    `resolve` gives what a name of the method's module is, `local` how often one of its own variables is named.
    """
    defined: dict[str, ast.expr] = {}
    count = 1
    for statement in reversed(statements[:-1]):
        name = target(statement)
        if name is None or name in defined or not local(name):
            break
        defined[name] = statement.value  # type: ignore[attr-defined]
        count += 1
    for length in range(min(count, 4), 0, -1):
        here = statements[len(statements) - length :]
        names = {s.targets[0].id: s.value for s in here[:-1]}  # type: ignore[attr-defined]
        for z in _place(here[-1]):
            pattern = _Pattern(resolve, names)
            try:
                mu, logvar = pattern.sample(z)
            except _Mismatch:
                continue
            inside = [n.id for s in here for n in ast.walk(s) if isinstance(n, ast.Name)]
            own = local(mu) and local(logvar) and pattern.used == set(names)
            if own and all(inside.count(name) == local(name) for name in names):
                found = (tuple(pattern.called), tuple(pattern.functions), pattern.device, pattern.dtype)
                return length, Sampling(mu, logvar, *found), z
    return None


def rewritten(statements: Sequence[ast.stmt], sampling: Sampling, z: ast.expr, call: str) -> list[ast.stmt]:
    """The statements after a look whether the call gives z."""
    made = f"{call}_z"
    arguments = [ast.Name(sampling.mu, ast.Load()), ast.Name(sampling.logvar, ast.Load()), *sampling.called]
    drawn = ast.Assign([ast.Name(made, ast.Store())], ast.Call(ast.Name(call, ast.Load()), arguments, []))
    last = copy.copy(statements[-1])
    last.value = _Put(z, made).visit(last.value)  # type: ignore[attr-defined]
    missing = ast.Compare(ast.Name(made, ast.Load()), [ast.Is()], [ast.Constant(None)])
    chosen = ast.If(missing, list(statements), [last])
    return [ast.copy_location(s, statements[-1]) for s in (drawn, chosen)]


class _Put(Copying):
    """Puts a variable in the place of one expression."""

    def __init__(self, old: ast.expr, name: str) -> None:
        self.old, self.name = old, name

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if node is self.old:
            return ast.copy_location(ast.Name(self.name, ast.Load()), self.old)
        return super().generic_visit(node)


def call(sampling: Sampling) -> Callable[..., torch.Tensor | None]:
    """Draws z, or None where the statements have to."""

    def draw(mu: Any, logvar: Any, *called: Any) -> torch.Tensor | None:
        if not is_plain(mu) or not is_plain(logvar) or watched():
            return None
        if any(now is not own for now, own in zip(called, sampling.functions, strict=True)):
            return None
        return ops.reparameterize(mu, logvar) if _is_served(sampling, mu, logvar) else None

    return draw


def _is_served(sampling: Sampling, mu: torch.Tensor, logvar: torch.Tensor) -> bool:
    if mu.shape != logvar.shape or mu.dtype is not logvar.dtype or mu.device != logvar.device:
        return False
    if not mu.is_floating_point() or mu.dim() == 0 or mu.numel() == 0 or thresholds.sampling(mu):
        return False
    if any(s < t for x in (mu, logvar) for s, t in pairwise(x.stride())):
        return False  # z would lie as they do, and the op's is contiguous
    if not sampling.dtype and mu.dtype is not torch.get_default_dtype():
        return False
    if not sampling.device and mu.device != torch.get_default_device():
        return False
    if torch.compiler.is_compiling():
        return mu.dtype is not torch.float64
    return not choose("reparameterize", forced_backend(), mu.device.type, mu.dtype)[1]
