"""`h = a + b`, perhaps `residual = h`, then `h = self.norm(h)` in a method: the sum and its RMS norm in one pass."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from torch import nn

from genai_fast.fusion.chains import obstacle
from genai_fast.fusion.rms_norms import fused, rms_of, sum_and_norm


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _assigned(statement: ast.stmt) -> tuple[str, ast.expr] | None:
    """The one variable that a statement assigns to, and its value."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1 or not _name(statement.targets[0]):
        return None
    return _name(statement.targets[0]), statement.value


class SumFinder(ast.NodeTransformer):
    """The part of a method's rewriter that finds such sums."""

    # Of the rewriter.
    prefix: str
    calls: dict[str, Callable[..., Any]]
    notes: list[tuple[str, str]]
    variables: set[str]

    def _sums(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """The statements, with one in the place of each such two or three."""
        found: list[ast.stmt] = []
        k = 0
        while k < len(statements):
            whole, count = self._sum_at(statements, k)
            found.append(statements[k] if whole is None else whole)
            k += count
        return found

    def _sum_at(self, statements: list[ast.stmt], k: int) -> tuple[ast.stmt | None, int]:
        parts = [_assigned(statement) for statement in statements[k : k + 3]]
        if len(parts) < 2 or parts[0] is None or parts[1] is None:
            return None, 1
        (total, value), copied = parts[0], [parts[0][0]]
        if not isinstance(value, ast.BinOp) or not isinstance(value.op, ast.Add):
            return None, 1
        last = parts[1]
        if _name(last[1]) == total:
            copied.append(last[0])
            last = parts[2] if len(parts) > 2 else None
        if last is None or not self._is_norm_of(last[1], total) or not {*copied, last[0]} <= self.variables:
            return None, 1
        called = f"{self.prefix}_sum"
        self.calls[called] = sum_and_norm
        norm = last[1].func
        self.notes.append((f"a + b; {ast.unparse(norm)}", "rms_norm with its sum"))
        given = [value.left, value.right, norm]
        # One after another: where the norm takes the sum's variable, that is the last to be assigned.
        targets: list[ast.expr] = [ast.Name(name, ast.Store()) for name in (*copied, last[0])]
        sums = ast.Constant(len(copied))
        call = ast.Call(ast.Name(called, ast.Load()), [*given, sums], [])
        whole = ast.Assign([ast.Tuple(targets, ast.Store())], call)
        return ast.fix_missing_locations(ast.copy_location(whole, statements[k])), len(copied) + 1

    def _is_norm_of(self, node: ast.expr, name: str) -> bool:
        """Whether a child that is such a norm now is called with this variable."""
        if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords or _name(node.args[0]) != name:
            return False
        child = self._child(node.func) if self._path(node.func) else None
        known = isinstance(child, nn.Module) and not child._modules and not obstacle(child)
        return known and (fused(child) is not None or rms_of(type(child)) is not None)
