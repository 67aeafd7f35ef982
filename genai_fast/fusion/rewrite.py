"""Chains of calls in the source of a method, and the source with one call in the place of each.

A chain is what calls children and activations on one another's results: nested in one expression, or by statements in a
row, where nothing else can see what is in between. A residual that is added to a norm's result is part of the chain;
what computes the residual runs between the two halves of it.
"""

from __future__ import annotations

import ast
import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from genai_fast.fusion import attention_calls, functions, latents, rotary_calls
from genai_fast.fusion.branches import BranchFinder
from genai_fast.fusion.chains import letter, spans
from genai_fast.fusion.multihead import WeightsFinder
from genai_fast.fusion.products import ProductFinder
from genai_fast.fusion.source import Refused
from genai_fast.fusion.statements import Replace, is_read, loads, mentions, plain_sum, put, target
from genai_fast.fusion.steps import METHODS, RESIDUAL, Begun, Chain, Step, Summed, calls_nothing
from genai_fast.fusion.sums import SumFinder

_SEE_ALL = {"locals", "vars", "eval", "exec"}  # who calls these may look at any variable


class Rewriter(BranchFinder, WeightsFinder, ProductFinder, SumFinder):
    """Puts one call in the place of each chain that holds something to run as one."""

    def __init__(
        self, model: nn.Module, function: types.FunctionType, definition: ast.FunctionDef, random: bool
    ) -> None:
        arguments = definition.args.posonlyargs + definition.args.args
        if not arguments:
            raise Refused("it takes no self")
        super().__init__(model, arguments[0].arg, function.__globals__)
        code = function.__code__
        names = [node for node in ast.walk(definition) if isinstance(node, ast.Name)]
        self.bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        self.bound |= {a.arg for a in ast.walk(definition) if isinstance(a, ast.arg)}
        self.bound |= {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
        if any(node.id == self.self and not isinstance(node.ctx, ast.Load) for node in names):
            raise Refused(f"it assigns to {self.self}")
        self.variables = set() if _SEE_ALL & set(code.co_names) else set(code.co_varnames) - set(code.co_cellvars)
        self.parameters = {a.arg for a in ast.walk(definition.args) if isinstance(a, ast.arg)}
        self.read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        self.uses = {name: sum(node.id == name for node in names) for name in self.variables}
        self.prefix = "chain"
        while any(name.startswith(self.prefix) for name in {*self.bound, *code.co_names}):
            self.prefix = f"_{self.prefix}"
        self.random = random
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
        for statement in self._sums(self._found(statements)):
            if joined and (whole := self._joined(joined[-1], statement)):
                joined[-1] = whole
            else:
                joined.append(self._begun(joined, statement) or statement)
        return [self.visit(statement) for statement in self.moved(joined)]

    def _found(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """The statements, with a call before those in a row that an op does at once."""
        made: list[ast.stmt] = []
        for statement in statements:
            made.append(statement)
            if statement in self.kept:
                continue
            name = f"{self.prefix}_whole_{len(self.calls)}"
            if self.random and (sampled := latents.find(made, self.named, self._uses)):
                length, sampling, z = sampled
                found, becomes = latents.rewritten(made[-length:], sampling, z, name), (str(sampling), "reparameterize")
                self.calls[name] = latents.call(sampling)
            elif attended := attention_calls.find(made, self.named, self._module, self._uses):
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
        name = target(first)
        if name not in self.variables:
            return None
        norm = self.norm(first.value)
        if isinstance(second, (ast.AugAssign, ast.Expr)):
            whole = plain_sum(second, name, first.value) if norm is not None else None
            return whole if whole is not None and self.summed(whole.value) is not None else None
        if self.step(first.value) is None and self.summed(first.value) is None:
            return None
        if not self._consumes(second, name):
            return None
        slot = self._first(second.value, name, norm is not None)
        if slot is None:
            return None
        whole = copy.copy(second)
        whole.value = Replace(slot, first.value).visit(second.value)
        return whole

    def _consumes(self, statement: ast.stmt, name: str) -> bool:
        """Whether the statement reads the variable once, and nothing else reads what it holds."""
        if loads(statement, name) != 1:
            return False
        if target(statement) == name or isinstance(statement, ast.Return):
            return True
        return self.uses[name] == 2 and name not in self.parameters and target(statement) is not None

    def _first(self, node: ast.expr | None, name: str, summed: bool, within: bool = False) -> ast.Name | None:
        """The variable, where it is a step's input and nothing but plain reads is evaluated before.

        `summed`: or where it is the first to be computed of a sum.
        """
        if isinstance(node, ast.Name):
            return node if within and node.id == name else None
        if step := self.step(node):
            return self._first(step.given, name, summed, True)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            return self._first(node.func.value, name, summed, True)
        parts: list[ast.expr] = []
        if summed and (addends := self.addends(node)) is not None:
            left, right, _ = addends
            parts = [left, right]
            if is_read(left, name):
                return left
            if is_read(right, name) and self.quiet(left):
                return right
        elif isinstance(node, ast.BinOp):
            parts = [node.left, node.right]
        elif isinstance(node, (ast.Tuple, ast.List)):
            parts = node.elts
        elif isinstance(node, ast.Call) and self.function(node.func) is not None:
            parts = node.args
        for part in parts:
            if not self.quiet(part):  # a global name may change
                return self._first(part, name, summed)
        return None

    # --- a norm waits for its residual

    def _begun(self, joined: list[ast.stmt], statement: ast.stmt) -> ast.stmt | None:
        """The statement, if it adds a residual to what an earlier one computed, and nothing in between sees that."""
        for at in reversed(range(len(joined) - 1)):
            name = target(joined[at])
            norm = self.norm(joined[at].value) if name in self.variables else None
            if norm is not None and mentions(statement, name):
                break
        else:
            return None
        if not all(self._passes(s, name, norm) for s in joined[at + 1 :]):
            return None
        if isinstance(statement, (ast.AugAssign, ast.Expr)):
            whole = plain_sum(statement, name, ast.copy_location(ast.Name(name, ast.Load()), statement))
            slot = whole and self.addends(whole.value)[0]
        else:
            whole = statement if self._consumes(statement, name) else None
            slot = whole and self._first(statement.value, name, True)
        sums = [] if slot is None else [n for n in ast.walk(whole.value) if self._is_sum_of(n, slot)]
        if not sums:
            return None
        slot.begun = begun = Begun(norm)
        if self.summed(sums[0]) is None:
            del slot.begun
            return None
        joined[at].value.begun = begun
        return whole

    def _is_sum_of(self, node: ast.AST, slot: ast.expr) -> bool:
        addends = self.addends(node)
        return addends is not None and slot in addends[:2]

    def _passes(self, statement: ast.stmt, name: str, norm: nn.Module) -> bool:
        """Whether the statement computes something beside a variable and a norm: assignments, perhaps under an if."""
        if mentions(statement, name):
            return False
        if isinstance(statement, ast.If):
            inside = (*statement.body, *statement.orelse)
            return calls_nothing(statement.test) and all(self._passes(s, name, norm) for s in inside)
        return target(statement) is not None and self.harmless(statement.value, norm)

    # --- a chain becomes a call

    def _gathered(self, node: ast.expr) -> tuple[list[tuple[Step, ast.Call]], ast.expr]:
        """Steps from the first to the last, with their calls, and what they begin with, rewritten."""
        steps, given = [], node
        while step := self.step(given):
            steps.insert(0, (step, given))
            given = step.given
        total = self.summed(given)
        if total is None:
            return steps, self.visit(given)
        act = steps.pop(0) if steps and letter(steps[0][0].module) in ("A", "a", "I", "P") else None
        whole = self._sum(total, act)
        if steps:
            put(*steps[0], whole)
        return steps, whole

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if begun := getattr(node, "begun", None):
            return self._begin(node, False, begun)
        if (total := self.summed(node)) is not None:
            return self._sum(total, None)
        function = self.function(node.func)
        if rotary_calls.rotary_of(function) is not None:
            return self._handed(node, "rotary", rotary_calls.call, (rotary_calls.describe(function), "rotary"))
        if function in functions.SERVED:
            note = (f"{function.__name__}()", f"{function.__name__} where it is faster")
            return self._handed(node, function.__name__, functions.instead_of(function), note)
        if self.step(node) is None:
            return self.generic_visit(node)
        steps, given = self._gathered(node)
        if not steps:
            return given
        chain = Chain(tuple(step.name for step, _ in steps), tuple(step.module for step, _ in steps))
        if not self._is_worth(chain.modules):
            put(*steps[0], given)
            return node
        self.chains.append(chain)
        return self._called(node, len(self.chains) - 1, "", [given], steps)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        total = self.summed(node)
        return super().visit_BinOp(node) if total is None else self._sum(total, None)

    def _handed(self, node: ast.Call, name: str, call: Callable[..., Any], note: tuple[str, str]) -> ast.AST:
        """A function is handed, with its arguments, to what decides at every call."""
        name = f"{self.prefix}_{name}"
        self.calls[name] = call
        self.notes.append(note)
        whole = self.generic_visit(node)
        return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), [node.func, *node.args], node.keywords), whole)

    def _is_worth(self, modules: Sequence[nn.Module]) -> bool:
        """Whether something of a chain runs as one; for convolutions alone nothing is replaced."""
        cut = spans("".join([letter(module, self.random) for module in modules]))
        return any(r.fused and r.letters.strip("CAaI") for r in cut)

    def _joins(self, node: ast.expr) -> bool:
        modules = []
        while step := self.step(node):
            modules.insert(0, step.module)
            node = step.given
        return self._is_worth(modules) or self.summed(node) is not None

    def _begin(self, node: ast.expr, quiet: bool, begun: Begun) -> ast.Call:
        """A call of the steps up to a norm, which may wait."""
        steps, given = self._gathered(node)
        begun.chain = len(self.chains)
        names, modules = (step.name for step, _ in steps), (step.module for step, _ in steps)
        self.chains.append(Chain((*names,), (*modules,), quiet))
        return self._called(node, begun.chain, "_begin", [given], steps)

    def _sum(self, total: Summed, act: tuple[Step, ast.Call] | None) -> ast.Call:
        """A call of a sum and the activation after it, if any."""
        begun, given = total.begun, total.given
        if begun is None:
            begun = Begun(None)
            residual = self.visit(total.residual) if total.how.left else None
            given = self._begin(given, total.how.left or self.quiet(total.residual), begun)
        else:
            residual = None
        residual = self.visit(total.residual) if residual is None else residual
        after = [] if act is None else [act]
        chain = self.chains[begun.chain]
        self.chains[begun.chain] = chain._replace(
            steps=(*chain.steps, total.how, *(step.name for step, _ in after)),
            modules=(*chain.modules, RESIDUAL, *(step.module for step, _ in after)),
        )
        operands = [residual, given] if total.how.left else [given, residual]
        return self._called(total.given, begun.chain, "_end", operands, after)

    def _called(
        self, at: ast.expr, chain: int, part: str, given: list[ast.expr], steps: list[tuple[Step, ast.Call]]
    ) -> ast.Call:
        # What is called is looked up at every call, but for a tensor's methods.
        children = [call.func for step, call in steps if isinstance(step.name, str) or step.name.function]
        function = ast.Name(f"{self.prefix}_{chain}{part}", ast.Load())
        return ast.copy_location(ast.Call(function, [*given, *children], []), at)

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
        self.swallows |= not self.passes_errors_on(node)
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
