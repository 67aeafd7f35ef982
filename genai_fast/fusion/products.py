"""activation(gate) * up, the middle of a SwiGLU or GEGLU: found in a method, and run as one call.

The activation's call becomes one that waits for the product, in its own place: what is evaluated, and in which order,
stays the same. At every call what is not served runs as it was written.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from genai_fast import ops
from genai_fast.backends import choose, forced_backend, is_plain
from genai_fast.fusion import thresholds
from genai_fast.fusion.activations import activation_name
from genai_fast.fusion.chains import global_hooks
from genai_fast.fusion.layout import keeps_order
from genai_fast.ops.dispatch import left_to_torch


class _Waiting:
    """An activation that has been called and not been computed."""

    __slots__ = ("activation", "called", "gate", "settings")

    def __init__(self, activation: str, called: Any, gate: torch.Tensor, settings: dict[str, Any]) -> None:
        self.activation, self.called, self.gate, self.settings = activation, called, gate, settings

    def value(self) -> torch.Tensor:
        return self.called(self.gate, **self.settings)

    def times(self, up: Any) -> torch.Tensor | None:
        """The product by one call; None if up is not such a tensor."""
        gate = self.gate
        alike = is_plain(up) and up.shape == gate.shape and up.dtype is gate.dtype and up.device == gate.device
        if not alike or not keeps_order(up):
            return None
        return ops.gated_act(gate, up, activation=self.activation)


def _serves(gate: Any) -> bool:
    if torch.compiler.is_compiling() or not is_plain(gate):  # a compiler joins the two itself
        return False
    if thresholds.gated("gelu", gate) or gate.dim() < 2:  # SiLU's threshold is higher
        return False
    if gate.dtype is torch.float64 or not gate.is_floating_point():
        return False
    if left_to_torch() or global_hooks() or not keeps_order(gate):
        return False
    return not choose("gated_act", forced_backend(), gate.device.type, gate.dtype)[1]


def waiting(settings: dict[str, Any]) -> Callable[[Any, Any], Any]:
    """called(gate, **settings), or what waits for the product with it."""

    def gate_of_product(gate: Any, called: Any) -> Any:
        name = activation_name(called, settings) if _serves(gate) else ""
        if name and not thresholds.gated(name, gate):
            return _Waiting(name, called, gate, settings)
        return called(gate, **settings)

    return gate_of_product


def product(left: Any, right: Any) -> Any:
    """left * right, of which one may be waiting."""
    waits, other = (left, right) if type(left) is _Waiting else (right, left)
    if type(waits) is not _Waiting:
        return left * right
    if type(other) is not _Waiting and (found := waits.times(other)) is not None:
        return found
    left, right = (x.value() if type(x) is _Waiting else x for x in (left, right))
    return left * right


class ProductFinder(ast.NodeTransformer):
    """The part of a method's rewriter that finds such products."""

    # Of the rewriter.
    prefix: str
    model: nn.Module
    calls: dict[str, Callable[..., Any]]
    notes: list[tuple[str, str]]
    variables: set[str]
    parameters: set[str]
    uses: dict[str, int]
    held: set[str]  # variables that hold nothing but a gate for its one product

    def find_held(self, definition: ast.FunctionDef) -> None:
        """Look for `gate = activation(self.linear(x))`, whose one use is as a factor, both where nothing is caught."""
        stored: dict[str, ast.expr] = {}
        factors: set[str] = set()
        for node in _plain_nodes(definition):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                stored[node.targets[0].id] = node.value
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                factors |= {side.id for side in (node.left, node.right) if isinstance(side, ast.Name)}
        once = {n for n in self.variables - self.parameters if self.uses[n] == 2}
        gates = {n for n in once & factors & stored.keys() if self._is_gate(stored[n])}
        self.held = {n for n in gates if self._is_new(stored[n].args[0])}

    def _is_gate(self, node: ast.expr) -> bool:
        """Whether a call is of such an activation now."""
        if not isinstance(node, ast.Call) or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
            return False
        settings = _settings(node)
        return settings is not None and activation_name(self._now(node.func), settings) != ""

    def _is_new(self, node: ast.expr) -> bool:
        """Whether a child with weights is called: what it gives is no view of a tensor that others have."""
        now = self._now(node.func) if isinstance(node, ast.Call) else None
        return isinstance(now, nn.Module) and any(True for _ in now.parameters())

    def _may_change(self, gate: ast.Call, other: ast.expr) -> bool:
        """Whether the other factor, computed after the gate, could change in place what the activation is of."""
        if self._is_new(gate.args[0]):
            return False
        names = {n.id for n in ast.walk(gate.args[0]) if isinstance(n, ast.Name)}
        return any(
            isinstance(n, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom))
            or (isinstance(n, ast.Call) and any(isinstance(m, ast.Name) and m.id in names for m in ast.walk(n)))
            for n in ast.walk(other)
        )

    def _now(self, node: ast.expr) -> Any:
        """What self.a, self.a.b or a global name is at present."""
        path = self._path(node)
        if not path:
            return self.function(node)
        child = self._child(node)
        return vars(self.model).get(path) if child is None else child

    def _wait(self, node: ast.Call) -> ast.expr:
        settings = _settings(node) or {}
        name = f"{self.prefix}_gate_{len(self.calls)}"
        self.calls[name] = waiting(settings)
        called = self._now(node.func)
        found = type(called).__name__ if isinstance(called, nn.Module) else ast.unparse(node.func)
        self.notes.append((f"{found} * ...", f"gated_act ({activation_name(called, settings)})"))
        given = [self.visit(node.args[0]), self.visit(node.func)]
        return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), given, []), node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if not isinstance(node.op, ast.Mult):
            return self.generic_visit(node)
        sides = [node.left, node.right]
        waits = [isinstance(s, ast.Name) and s.id in self.held for s in sides]
        if not any(waits):
            for k, side in enumerate(sides):
                other = sides[1 - k]
                if isinstance(other, ast.Constant) or not self._is_gate(side):
                    continue
                if not (k == 0 and self._may_change(side, other)) and not self._joins(side):
                    waits[k] = True
                    sides[k] = self._wait(side)
                    sides[1 - k] = self.visit(other)
                    break
        else:
            sides = [self.visit(side) for side in sides]
        if not any(waits):
            return self.generic_visit(node)
        name = f"{self.prefix}_product"
        self.calls[name] = product
        return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), sides, []), node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        target = node.targets[0]
        if len(node.targets) == 1 and isinstance(target, ast.Name) and target.id in self.held:
            node.value = self._wait(node.value)
            return node
        return self.generic_visit(node)

    def _joins(self, node: ast.expr) -> bool:
        """Whether the activation is part of another chain, with a norm before it."""
        raise NotImplementedError


def _settings(node: ast.Call) -> dict[str, Any] | None:
    """The constants that are given by name; None if there are others."""
    try:
        found = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
    except (ValueError, TypeError):
        return None
    return None if None in found else found


def _plain_nodes(node: ast.AST) -> list[ast.AST]:
    """All below, but for what a handler may see half done and for what has a scope of its own."""
    apart = (ast.Try, ast.TryStar, ast.With, ast.AsyncWith, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    found = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*apart, ast.ClassDef, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp)):
            found += [child, *_plain_nodes(child)]
    return found
