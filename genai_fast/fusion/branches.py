"""Norms before, after and between branches: what activates them, or adds a residual, moves into the same branch.

`x = self.norm(x)`, then `if self.act: x = self.act(x)`, is `if self.act: x = self.act(self.norm(x))`, else
`x = self.norm(x)`, where the test reads nothing but settings; and what follows an `if` runs after each of its branches.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import types
from collections.abc import Sequence
from typing import Any

from torch import nn

from genai_fast.fusion.chains import letter, obstacle
from genai_fast.fusion.run import flat
from genai_fast.fusion.source import Refused, source_of
from genai_fast.fusion.statements import append_to_branches, ends, mentions, target
from genai_fast.fusion.steps import Reader

_TESTS = (
    ast.BoolOp, ast.UnaryOp, ast.Compare, ast.Name, ast.Constant, ast.Attribute, ast.Tuple, ast.List, ast.Set,
    ast.boolop, ast.unaryop, ast.cmpop, ast.expr_context,
)  # fmt: skip


class BranchFinder(Reader):
    """The part of a method's rewriter that moves statements into branches."""

    def _joined(self, first: ast.stmt, second: ast.stmt) -> ast.stmt | None:
        raise NotImplementedError

    def moved(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        """The statements, with some of them in the branches after or before them."""
        found: list[ast.stmt] = []
        for statement in statements:
            statement = self._as_branches(found, statement)
            before = found[-1] if found else None
            if isinstance(statement, ast.If) and before is not None and self._enters(before, statement):
                found[-1] = statement
                for body in (statement.body, statement.orelse):
                    body.insert(0, copy.deepcopy(before))
            elif isinstance(before, ast.If) and any(self._follows(statement, end) for end in ends(before)):
                append_to_branches(before, statement)
            else:
                found.append(statement)
        return found

    def _as_branches(self, found: Sequence[ast.stmt], statement: ast.stmt) -> ast.stmt:
        """`x = a if test else b` as an if, where a norm before it enters."""
        value = statement.value if isinstance(statement, (ast.Assign, ast.Return)) else None
        if not found or not isinstance(value, ast.IfExp):
            return statement
        bodies = []
        for part in (value.body, value.orelse):
            branch: Any = copy.copy(statement)
            branch.value = part
            bodies.append([branch])
        whole = ast.copy_location(ast.If(value.test, *bodies), statement)
        return whole if self._enters(found[-1], whole) else statement

    def _enters(self, norm: ast.stmt, branches: ast.If) -> bool:
        """Whether a norm is computed before branches, one of which continues with it, and could be inside them."""
        name = target(norm)
        if name not in self.variables or _begun(norm) or _begun(branches) or not self._changes_no_setting(norm.value):
            return False
        if mentions(ast.Expr(branches.test), name) or not self._is_setting(branches.test):
            return False
        firsts = [body[0] for body in (branches.body, branches.orelse) if body]
        return any(
            self._enters(norm, first)
            if isinstance(first, ast.If)
            else self._activated(norm, first) or self._added(norm, first)
            for first in firsts
        )

    def _follows(self, statement: ast.stmt, end: ast.stmt) -> bool:
        """Whether a statement continues with the norm that a branch ends with."""
        if target(end) not in self.variables:
            return False
        if isinstance(statement, ast.If):
            return self._enters(end, statement)
        return not _begun(statement) and self._activated(end, statement)

    def _activated(self, norm: Any, statement: ast.stmt) -> bool:
        """Whether the statement calls an activation on a norm's result alone."""
        step = self.step(norm.value)
        if step is None or letter(step.module) not in ("N", "G"):
            return False
        whole: Any = self._joined(norm, copy.deepcopy(statement))
        steps = [] if whole is None else [self.step(node) for node in ast.walk(whole.value)]
        return any(s is not None and s.given is norm.value and letter(s.module) in ("A", "a", "P") for s in steps)

    def _added(self, norm: Any, statement: ast.stmt) -> bool:
        """Whether the statement adds to a norm's result."""
        if self.norm(norm.value) is None:
            return False
        whole: Any = self._joined(norm, copy.deepcopy(statement))
        sums = [] if whole is None else [self.summed(node) for node in ast.walk(whole.value)]
        return any(total is not None and total.given is norm.value for total in sums)

    def _changes_no_setting(self, node: ast.expr) -> bool:
        """Whether nothing but torch's own modules, in a row, are called on a variable."""
        while step := self.step(node):
            for module in flat([step.module]):
                if not type(module).__module__.startswith("torch.nn.") or module._modules or obstacle(module):
                    return False
            node = step.given
        return self.quiet(node)

    def _is_setting(self, node: ast.expr) -> bool:
        """Whether an expression reads nothing but variables and attributes that computing a norm does not change."""
        for part in ast.walk(node):
            if not isinstance(part, _TESTS):
                return False
            if isinstance(part, ast.Name) and part.id in self.bound - self.variables:
                return False  # a function inside the method may assign it
            if isinstance(part, ast.Attribute) and not self._is_own(part):
                return False
        return True

    def _is_own(self, node: ast.Attribute) -> bool:
        """Whether that is self.name, and what a plain look finds."""
        if not isinstance(node.value, ast.Name) or node.value.id != self.self:
            return False
        if node.attr in self.model._buffers or node.attr in self.model._parameters:
            return False
        cls = type(self.model)
        looks = cls.__getattribute__ is nn.Module.__getattribute__ and cls.__getattr__ is nn.Module.__getattr__
        return looks and not hasattr(type(inspect.getattr_static(cls, node.attr, None)), "__get__")

    # --- blocks that swallow no exception

    def passes_errors_on(self, node: ast.With) -> bool:
        """Whether no exception is caught at the end of the block, so that no code sees what is in between."""
        return all(self._passes_on(item.context_expr) for item in node.items)

    def _passes_on(self, opened: ast.expr) -> bool:
        if isinstance(opened, ast.IfExp):
            return self._passes_on(opened.body) and self._passes_on(opened.orelse)
        manager = self.named(opened.func) if isinstance(opened, ast.Call) else None
        if manager is contextlib.nullcontext or (getattr(manager, "__module__", None) or "").startswith("torch."):
            return True
        return isinstance(manager, type) and _lets_pass(inspect.getattr_static(manager, "__exit__", None))


def _begun(statement: ast.stmt) -> bool:
    return any(hasattr(node, "begun") for node in ast.walk(statement))


def _lets_pass(leave: Any) -> bool:
    """Whether an __exit__ returns nothing that is true."""
    if not isinstance(leave, types.FunctionType):
        return False
    try:
        definition = source_of(leave).definition
    except Refused:
        return False
    returned = [node.value for node in ast.walk(definition) if isinstance(node, ast.Return)]
    yields = any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in ast.walk(definition))
    return not yields and all(
        value is None or (isinstance(value, ast.Constant) and not value.value) for value in returned
    )
