"""nn.MultiheadAttention by our attention, and calls of it whose weights are not used.

`self.attn(x, x, x)[0]` and `y, _ = self.attn(x, x, x)`: PyTorch computes the weights unless it is told not to, and with
them the whole matrix of scores.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import ops
from genai_fast.backends import choose, forced_backend, is_plain
from genai_fast.fusion import thresholds
from genai_fast.fusion.chains import obstacle, watched
from genai_fast.fusion.classes import original
from genai_fast.fusion.operands import needs_gradient
from genai_fast.ops.causal_attention import MOST_CHANNELS
from genai_fast.ops.dispatch import left_to_torch
from genai_fast.precision import autocast_dtype

# Where ours is the faster one: a CPU has instructions for the narrow types that ours does not use.
_DTYPES = {"cuda": (torch.float16, torch.bfloat16), "cpu": (torch.float32,)}
_POSITIONS = ("query", "key", "value", "key_padding_mask")  # the next argument by position would be need_weights
_NAMES = {*_POSITIONS, "attn_mask", "average_attn_weights", "is_causal"}


def is_served(
    module: nn.MultiheadAttention, query: Any, key: Any, value: Any, key_padding_mask: Any = None,
    attn_mask: Any = None, is_causal: bool = False,
) -> bool:  # fmt: skip
    """Whether our attention takes this call, without its weights, and is worth it."""
    if key_padding_mask is not None or module.bias_k is not None or module.add_zero_attn or left_to_torch():
        return False
    if torch.compiler.is_compiling() or (attn_mask is None and is_causal):  # that is an error of PyTorch's
        return False
    if not _fits(module, query, key, value) or not 0 <= module.dropout < 1:
        return False
    if attn_mask is not None and not _is_causal(attn_mask, query, key, module.batch_first, is_causal):
        return False
    kind, dtype = query.device.type, autocast_dtype(query.device.type) or query.dtype
    steps = 1 if module.batch_first else 0
    scores = query.size(1 - steps) * module.num_heads * query.size(steps) * key.size(steps)
    given = (query, key, value, *module._parameters.values())
    gradients, drops = needs_gradient(*given), module.training and module.dropout > 0
    if dtype not in _DTYPES.get(kind, ()) or thresholds.multihead(query, scores, drops, gradients):
        return False
    return not choose("causal_attention", forced_backend(), kind, dtype)[1]


def _fits(module: nn.MultiheadAttention, query: Any, key: Any, value: Any) -> bool:
    """Whether these are tensors that the module takes; else PyTorch says what is wrong."""
    given, dims = (query, key, value), (module.embed_dim, module.kdim, module.vdim)
    if not all(is_plain(x) and x.dim() == 3 and x.numel() and x.size(2) == d for x, d in zip(given, dims, strict=True)):
        return False
    batch = 0 if module.batch_first else 1
    if key.shape[:2] != value.shape[:2] or key.size(batch) != query.size(batch) or module.head_dim > MOST_CHANNELS:
        return False
    weights = [*module._parameters.values(), module.out_proj.weight, module.out_proj.bias]
    first = module.out_proj.weight
    return all(
        is_plain(t) and t.dtype is first.dtype and t.device == first.device
        for t in (*given, *(w for w in weights if w is not None))
    )


def _is_causal(mask: Any, query: torch.Tensor, key: torch.Tensor, batch_first: bool, hinted: bool) -> bool:
    """Whether it hides later positions, of as many as there are, and nothing else."""
    steps = query.size(1 if batch_first else 0)
    if steps != key.size(1 if batch_first else 0) or not is_plain(mask) or mask.shape != (steps, steps):
        return False
    if hinted:  # then PyTorch does not read the mask either
        return True
    if not mask.is_cpu:  # to look at it would wait for the device
        return False
    later = torch.ones(steps, steps, dtype=torch.bool).triu_(1)
    if mask.dtype is torch.bool:
        return torch.equal(mask, later)
    return mask.is_floating_point() and torch.equal(mask, torch.zeros_like(mask).masked_fill_(later, -torch.inf))


def attend(
    module: nn.MultiheadAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool
) -> torch.Tensor:
    """The result, which lies in memory as PyTorch's: [T, B, E], or that transposed."""
    q, k, v = _projected(module, query, key, value)
    heads = (module.num_heads, module.head_dim)
    q, k, v = (x.unflatten(2, heads).permute(1, 2, 0, 3) for x in (q, k, v))
    y = ops.causal_attention(q, k, v, causal=causal, dropout=module.dropout if module.training else 0.0)
    y = F.linear(y.permute(2, 0, 1, 3).flatten(2), module.out_proj.weight, module.out_proj.bias)
    return y.transpose(0, 1) if module.batch_first else y


def _projected(module: nn.MultiheadAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
    """q, k and v [T, B, E], by as few products as there are different tensors."""
    bias = module.in_proj_bias
    alike, pair = query is key and key is value, key is value
    q, k, v = (x.transpose(0, 1) if module.batch_first else x for x in (query, key, value))
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
    if alike:
        return F.linear(q, module.in_proj_weight, bias).chunk(3, -1)
    sizes = [module.embed_dim] * 3 if not pair else [module.embed_dim, 2 * module.embed_dim]
    weights = module.in_proj_weight.split(sizes)
    biases = (None,) * 3 if bias is None else bias.split(sizes)
    made = [F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=False)]
    return (made[0], *made[1].chunk(2, -1)) if pair else tuple(made)


def without_weights(module: Any, *args: Any, **named: Any) -> Any:
    """The call, which need not give the weights if our attention serves it."""
    given = dict(zip(_POSITIONS, args, strict=False)) | named
    own = type(module) is not nn.MultiheadAttention and original(type(module)) is nn.MultiheadAttention
    if own and given.keys() >= set(_POSITIONS[:3]) and not obstacle(module) and not watched():
        given.pop("average_attn_weights", None)
        if is_served(module, **given):
            return module(*args, need_weights=False, **named)
    return module(*args, **named)


class WeightsFinder(ast.NodeTransformer):
    """The part of a method's rewriter that finds such calls."""

    # Of the rewriter.
    variables: set[str]
    read: set[str]  # names that the method loads

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if isinstance(node.slice, ast.Constant) and node.slice.value == 0 and self._attends(node.value):
            node.value = self._unweighted(node.value)
            return node
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else []
        if len(node.targets) == 1 and len(targets) == 2 and self._attends(node.value):
            last = targets[1]
            if isinstance(last, ast.Name) and last.id in self.variables - self.read:
                node.value = self._unweighted(node.value)
                return node
        return super().visit_Assign(node)

    def _attends(self, node: ast.expr) -> bool:
        """Whether a call is of such a module now, with arguments that say nothing about weights."""
        if not isinstance(node, ast.Call) or original(type(self._module(node.func))) is not nn.MultiheadAttention:
            return False
        if len(node.args) > len(_POSITIONS) or any(isinstance(a, ast.Starred) for a in node.args):
            return False
        return {k.arg for k in node.keywords} <= _NAMES

    def _unweighted(self, node: ast.Call) -> ast.AST:
        return self._handed(node, "attend", without_weights, ("attention's weights", "not computed: they are not used"))

    def _module(self, node: ast.expr) -> nn.Module | None:
        raise NotImplementedError

    def _handed(self, node: ast.Call, name: str, call: Callable[..., Any], note: tuple[str, str]) -> ast.AST:
        raise NotImplementedError
