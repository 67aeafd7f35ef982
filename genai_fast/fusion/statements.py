"""Small questions about statements and expressions of a method's source, and small changes to them."""

from __future__ import annotations

import ast
import copy

from genai_fast.fusion.steps import Step


def ends(node: ast.If) -> list[ast.stmt]:
    """The last statements of its branches, and of those of the ifs that end them."""
    found: list[ast.stmt] = []
    for body in (node.body, node.orelse):
        if body:
            found += ends(body[-1]) if isinstance(body[-1], ast.If) else [body[-1]]
    return found


def append_to_branches(node: ast.If, statement: ast.stmt) -> None:
    """Let the statement follow each branch that comes to its end."""
    for body in (node.body, node.orelse):
        if not body or not isinstance(body[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break)):
            body.append(copy.deepcopy(statement))


class Copying(ast.NodeTransformer):
    """Changes copies: the tree that it visits stays as it is."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        changed = copy.copy(node)
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                setattr(changed, name, [self.visit(v) if isinstance(v, ast.AST) else v for v in value])
            elif isinstance(value, ast.AST):
                setattr(changed, name, self.visit(value))
        return changed


class Replace(ast.NodeTransformer):
    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.new if node is self.old else node


def put(step: Step, call: ast.Call, given: ast.expr) -> None:
    """Let a step's call be of something else."""
    if isinstance(call.func, ast.Attribute) and call.func.value is step.given:
        call.func.value = given
    else:
        call.args[0] = given


def is_read(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def plain_sum(statement: ast.AugAssign | ast.Expr, name: str, given: ast.expr) -> ast.Assign | None:
    """`name = given + residual`, which changes what is given, for `name += residual` or `name.add_(residual)`."""
    if isinstance(statement, ast.Expr):
        call = statement.value
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or call.func.attr != "add_":
            return None
        if not is_read(call.func.value, name) or loads(statement, name) != 1:
            return None
        method = ast.copy_location(ast.Attribute(given, "add_", ast.Load()), call)
        changed = ast.copy_location(ast.Call(method, call.args, call.keywords), call)
        stored = ast.copy_location(ast.Name(name, ast.Store()), call)
        return ast.copy_location(ast.Assign([stored], changed), statement)
    if not isinstance(statement.op, ast.Add) or not isinstance(statement.target, ast.Name):
        return None
    if statement.target.id != name or loads(statement, name):
        return None
    total = ast.copy_location(ast.BinOp(given, ast.Add(), statement.value), statement)
    total.inplace = True
    return ast.copy_location(ast.Assign([statement.target], total), statement)


def mentions(statement: ast.stmt, name: str) -> bool:
    """Whether the variable is in the statement."""
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(statement))


def target(statement: ast.stmt) -> str | None:
    """The one variable that the statement assigns to."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    return statement.targets[0].id if isinstance(statement.targets[0], ast.Name) else None


def loads(statement: ast.stmt, name: str) -> int:
    return sum(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in ast.walk(statement))
