"""Attention written out, softmax(scale q k^T + mask) v: found in the source of a method, and run as one call.

The statements stay, for what the op does not take; before them stands a call that gives the result, or None.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import ops
from genai_fast.backends import choose, forced_backend, is_plain
from genai_fast.fusion import thresholds
from genai_fast.fusion.chains import untouched, watched
from genai_fast.fusion.statements import Copying, target
from genai_fast.precision import autocast_dtype

_MOST_STATEMENTS = 8
_MASKED = -1e9  # a fill of at most this leaves nothing of a masked score in float32
_MOST_CHANNELS = 256
# What a scale or a mask may be made of, so that it can be computed before the scores.
_PURE = (
    ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Constant, ast.Compare, ast.UnaryOp, ast.BinOp, ast.Tuple,
    ast.operator, ast.unaryop, ast.cmpop, ast.expr_context,
)  # fmt: skip


class Attention(NamedTuple):
    """Statements that attend: what they read, as the source has it, and the functions they call."""

    q: ast.expr
    k: ast.expr
    v: ast.expr
    scale: ast.expr
    mask: ast.expr | None  # true where nothing is seen
    dropout: ast.expr | None  # a module
    called: tuple[ast.expr, ...]
    functions: tuple[Any, ...]

    def __str__(self) -> str:
        return "softmax(q k^T) v"


class _Mismatch(Exception):
    pass


class _Pattern:
    def __init__(self, resolve: Callable[[ast.expr], Any], child: Callable[[ast.expr], Any]) -> None:
        self.resolve, self.child = resolve, child
        self.called: list[ast.expr] = []
        self.functions: list[Any] = []

    def _calls(self, name: ast.expr, function: Any) -> None:
        self.called.append(name)
        self.functions.append(function)

    def product(self, node: ast.expr) -> tuple[ast.expr, ast.expr]:
        """a and b of a @ b, in any spelling."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            return node.left, node.right
        if isinstance(node, ast.Call) and not node.keywords:
            if len(node.args) == 2 and self.resolve(node.func) is torch.matmul:
                self._calls(node.func, torch.matmul)
                return node.args[0], node.args[1]
            if _method(node, "matmul", 1):
                return node.func.value, node.args[0]  # type: ignore[attr-defined]
        raise _Mismatch

    def weights(self, node: ast.expr) -> tuple[ast.expr, ast.expr | None]:
        """The softmax, and the dropout after it."""
        if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
            module = self.child(node.func)
            if type(module) is nn.Dropout:
                return node.args[0], node.func
        return node, None

    def scores(self, node: ast.expr) -> ast.expr:
        """What the softmax over the last dimension is of."""
        if not isinstance(node, ast.Call):
            raise _Mismatch
        function = self.resolve(node.func)
        if function in (F.softmax, torch.softmax):
            given, rest = node.args[:1], node.args[1:]
            self._calls(node.func, function)
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "softmax" and function is None:
            given, rest = [node.func.value], node.args
        else:
            raise _Mismatch
        dims = rest + [k.value for k in node.keywords if k.arg == "dim"]
        if (
            len(given) != 1
            or len(dims) != 1
            or len(node.keywords) != len(dims) - len(rest)
            or _number(dims[0]) not in (-1, 3)
        ):
            raise _Mismatch
        return given[0]

    def masked(self, node: ast.expr) -> tuple[ast.expr, ast.expr | None]:
        """The scores, and what masks them."""
        if not _method(node, "masked_fill", 2):
            return node, None
        mask, value = node.args  # type: ignore[attr-defined]
        if not _is_pure(mask) or not self._is_lowest(value):
            raise _Mismatch
        return node.func.value, mask  # type: ignore[attr-defined]

    def _is_lowest(self, node: ast.expr) -> bool:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            number = _number(node)
            operand = node.operand
            infinite = _is_call(operand, "float", "inf") or self._infinity(operand)
            return infinite or (number is not None and number <= _MASKED)
        return _is_call(node, "float", "-inf")

    def _infinity(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == "inf" and self.resolve(node) in (math.inf,)

    def scaled(self, node: ast.expr) -> tuple[ast.expr, ast.expr]:
        """q k^T, and what it is multiplied by."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
            if self._is_scale(node.right):
                scale = node.right
                if isinstance(node.op, ast.Div):
                    scale = ast.BinOp(ast.Constant(1.0), ast.Div(), scale)
                return node.left, scale
            if isinstance(node.op, ast.Mult) and self._is_scale(node.left):
                return node.right, node.left
        return node, ast.Constant(1.0)

    def _is_scale(self, node: ast.expr) -> bool:
        """Whether a number is made of sizes and constants."""
        for part in ast.walk(node):
            if isinstance(part, ast.Call):
                size = _method(part, "size", 1)
                root = self.resolve(part.func) is math.sqrt and len(part.args) == 1
                if part.keywords or not (size or root):
                    return False
            elif not isinstance(part, _PURE) or isinstance(part, ast.Tuple):
                return False
        return True

    def transposed(self, node: ast.expr) -> ast.expr:
        """k of k^T."""
        if isinstance(node, ast.Attribute) and node.attr == "mT":
            return node.value
        if _method(node, "transpose", 2):
            dims = tuple(map(_number, node.args))  # type: ignore[attr-defined]
            if dims in ((-2, -1), (-1, -2), (2, 3), (3, 2)):
                return node.func.value  # type: ignore[attr-defined]
        if _method(node, "permute", 4) and tuple(map(_number, node.args)) == (0, 1, 3, 2):  # type: ignore[attr-defined]
            return node.func.value  # type: ignore[attr-defined]
        raise _Mismatch

    def attention(self, node: ast.expr) -> Attention:
        weights, v = self.product(node)
        softmax, dropout = self.weights(weights)
        scores, mask = self.masked(self.scores(softmax))
        products, scale = self.scaled(scores)
        q, transposed = self.product(products)
        k = self.transposed(transposed)
        if not all(isinstance(x, ast.Name) for x in (q, k, v)):
            raise _Mismatch
        return Attention(q, k, v, scale, mask, dropout, tuple(self.called), tuple(self.functions))


def _method(node: ast.expr, name: str, arguments: int) -> bool:
    if not isinstance(node, ast.Call) or node.keywords or len(node.args) != arguments:
        return False
    return isinstance(node.func, ast.Attribute) and node.func.attr == name


def _is_call(node: ast.expr, name: str, argument: str) -> bool:
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    return called and len(node.args) == 1 and isinstance(node.args[0], ast.Constant) and node.args[0].value == argument


def _number(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def _is_pure(node: ast.expr) -> bool:
    return all(isinstance(part, _PURE) for part in ast.walk(node))


class _Substitute(Copying):
    """Puts expressions in the place of variables."""

    def __init__(self, values: dict[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.values.get(node.id, node) if isinstance(node.ctx, ast.Load) else node


def find(
    statements: Sequence[ast.stmt], resolve: Callable[[ast.expr], Any], child: Callable[[ast.expr], Any],
    local: Callable[[str], int],
) -> tuple[int, Attention] | None:  # fmt: skip
    """In the last statements of a body: how many attend, and how.

    `resolve` gives what a name of the method's module is, `child` the module that self.a is, `local` how often one of
    the method's own variables is named.
    """
    last = statements[-1]
    if not isinstance(last, (ast.Assign, ast.Return)) or last.value is None or not _multiplies(last.value):
        return None
    count = 1
    while count < min(_MOST_STATEMENTS, len(statements)) and target(statements[-count - 1]):
        count += 1
    for length in range(1, count + 1):
        here = statements[len(statements) - length :]
        values: dict[str, ast.expr] = {}
        for statement in here[:-1]:
            name = target(statement)
            values[name] = _Substitute(dict(values)).visit(statement.value)  # type: ignore[attr-defined]
        try:
            found = _Pattern(resolve, child).attention(_Substitute(values).visit(last.value))
        except _Mismatch:
            continue
        result = target(last)
        inside = [n.id for s in here for n in ast.walk(s) if isinstance(n, ast.Name)]
        alone = all(name == result or inside.count(name) == local(name) for name in values)
        read = [n.id for part in found[:6] if part is not None for n in ast.walk(part) if isinstance(n, ast.Name)]
        if alone and not values.keys() & set(read):
            return length, found
    return None


def _multiplies(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.MatMult)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "matmul"


def rewritten(statements: Sequence[ast.stmt], attention: Attention, name: str) -> list[ast.stmt]:
    """The statements after a look whether calls give the result: one of what is there, one of what must be made."""
    nothing, made = ast.Constant(None), f"{name}_result"
    looked = ast.Call(ast.Name(f"{name}_ready", ast.Load()), [attention.q, attention.k, attention.v], [])
    given = [attention.q, attention.k, attention.v, attention.scale, attention.mask or nothing]
    given += [attention.dropout or nothing, *attention.called]
    run = ast.BoolOp(ast.And(), [looked, ast.Call(ast.Name(name, ast.Load()), given, [])])
    last: Any = statements[-1]
    result = ast.Name(made, ast.Load())
    served = ast.Return(result) if isinstance(last, ast.Return) else ast.Assign(last.targets, result)
    missing = ast.Compare(ast.Name(made, ast.Load()), [ast.Is()], [nothing])
    drawn = ast.Assign([ast.Name(made, ast.Store())], run)
    chosen = ast.If(missing, list(statements), [ast.copy_location(served, last)])
    return [ast.copy_location(s, last) for s in (drawn, chosen)]


def ready(q: Any, k: Any, v: Any) -> bool | None:
    """True if the op takes these and is worth its call; else None."""
    if torch.compiler.is_compiling() or not (is_plain(q) and is_plain(k) and is_plain(v)) or watched():
        return None
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.size(3) != k.size(3) or 0 in q.shape:
        return None
    if not q.dtype is k.dtype is v.dtype or not q.device == k.device == v.device or 0 in k.shape:
        return None
    if not q.is_floating_point() or q.dtype is torch.float64 or q.size(3) > _MOST_CHANNELS:
        return None
    if any(x.size(3) > 1 and x.stride(3) != 1 for x in (q, k, v)):
        return None
    if autocast_dtype(q.device.type) not in (None, q.dtype) or thresholds.attention(q, k):
        return None
    return None if choose("causal_attention", forced_backend(), q.device.type, q.dtype)[1] else True


def call(attention: Attention, random: bool) -> Callable[..., torch.Tensor | None]:
    """softmax(scale q k^T) v by the op, or None where the statements have to do it."""

    def attend(q: Any, k: Any, v: Any, scale: Any, mask: Any, dropout: Any, *called: Any) -> torch.Tensor | None:
        if any(now is not own for now, own in zip(called, attention.functions, strict=True)):
            return None
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            return None
        causal = mask is not None
        if causal and not _is_causal(mask, q.size(2), k.size(2)):
            return None
        p = 0.0
        if dropout is not None:
            if not untouched(dropout, nn.Dropout) or not isinstance(dropout.p, (int, float)):
                return None
            p = dropout.p if dropout.training else 0.0
            if (p and not random) or not 0 <= p < 1:
                return None
        return ops.causal_attention(q, k, v, scale=float(scale), causal=causal, dropout=p).contiguous()

    return attend


def _is_causal(mask: Any, queries: int, keys: int) -> bool:
    """Whether it hides what comes later from as many queries as keys, in every sample and head."""
    if not is_plain(mask) or mask.dtype is not torch.bool or queries != keys or not mask.is_cpu:
        return False
    if mask.shape[-2:] != (queries, keys) or mask.numel() != queries * keys:
        return False
    return torch.equal(mask.view(queries, keys), torch.ones(queries, keys, dtype=torch.bool).triu_(1))
