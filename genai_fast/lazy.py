"""Logits that are made on request: the loss of a language model without the largest tensor of its training.

A head that is lazy returns, in training, a tensor that knows what it is the product of. F.cross_entropy of it, and of
its rows, is `ops.linear_cross_entropy`; anything else computes it, once. So every model and loss function that ends in
F.cross_entropy or nn.CrossEntropyLoss is served, as those of transformers do.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from genai_fast import ops
from genai_fast.backends import is_plain
from genai_fast.fusion.chains import obstacle
from genai_fast.fusion.classes import original, replacement, subclass
from genai_fast.fusion.functions import weights_fit
from genai_fast.ops.dispatch import left_to_torch
from genai_fast.precision import autocast_dtype

__all__ = ["LazyLogits", "lazy_logits"]

_ROWS = {torch.Tensor.view, torch.Tensor.reshape, torch.reshape}
_SAME = {torch.Tensor.contiguous}
_FLOAT = {torch.Tensor.float: torch.float32}


class LazyLogits(torch.Tensor):
    """x weight^T + bias [..., V], computed when it is looked at. It has a gradient as any product."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    product_dtype: torch.dtype | None  # of autocast
    versions: tuple[int, ...]
    made: torch.Tensor | None

    @staticmethod
    def of(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, product: Any, dtype: Any) -> LazyLogits:
        """Of x, with its graph. product: autocast's dtype or None; dtype: of the logits."""
        logits = _Promise.apply(x, weight, bias, product, dtype)
        logits.x, logits.weight, logits.bias = x, weight, bias
        logits.product_dtype, logits.made = product, None
        logits.versions = tuple(t._version for t in (x, weight, bias) if t is not None)
        return logits

    def value(self) -> torch.Tensor:
        """The logits, without a graph.

        Raises RuntimeError: weight, bias or x have changed since the model ran.
        """
        if self.made is None:
            parts = (self.x, self.weight, self.bias)
            if self.versions != tuple(t._version for t in parts if t is not None):
                raise RuntimeError(
                    "LazyLogits: expected the head's weight and input as they were when the model ran, got them changed"
                    " in place since; look at the logits before the optimizer's step, or do not use lazy_logits"
                )
            with torch.no_grad(), _casting(self.x.device.type, self.product_dtype):
                self.made = F.linear(*parts).to(self.dtype)
        return self.made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.cross_entropy and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
        if args and isinstance(args[0], LazyLogits):
            found = _lazily(function, args[0], args[1:], kwargs)
            if found is not None:
                return found
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """What is done with the numbers; gradients are recorded before this."""
        args, kwargs = tree_map(lambda x: x.value() if isinstance(x, LazyLogits) else x, (args, kwargs or {}))
        return function(*args, **kwargs)


class _Promise(torch.autograd.Function):
    """The product, not computed; its gradients are those of the product."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, product: Any, dtype: Any) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.product, ctx.bias_dtype = product, None if bias is None else bias.dtype
        shape = (*x.shape[:-1], weight.size(0))
        return torch.Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dtype = ctx.product or x.dtype
        rows = grad.to(dtype).reshape(-1, weight.size(0))
        grad_x = (rows @ weight.to(dtype)).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_weight, of_bias = ctx.needs_input_grad[1:3]
        grad_weight = (rows.t() @ x.to(dtype).reshape(-1, x.size(-1))).to(weight.dtype) if of_weight else None
        return grad_x, grad_weight, rows.sum(0).to(ctx.bias_dtype) if of_bias else None, None, None


def _casting(device: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast as it was when the model ran."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, dtype, enabled=dtype is not None)


def _lazily(function: Any, logits: LazyLogits, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of what needs no logits; None of all else."""
    x, columns = logits.x, logits.weight.size(0)
    if function is F.cross_entropy:
        return _cross_entropy(logits, *args, **kwargs)
    if logits.made is not None:
        return None
    if function in _ROWS and not kwargs:
        shape = tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        if shape and all(type(s) is int for s in shape) and shape[-1] == columns:
            return _again(logits, x.reshape(*shape[:-1], x.size(-1)), logits.dtype)
    if function in _SAME and not args and not kwargs:
        return logits
    if function in _FLOAT and not args and not kwargs:
        return logits if logits.dtype is _FLOAT[function] else _again(logits, x, _FLOAT[function])
    if function is torch.Tensor.__getitem__ and _is_of_rows(args[0], logits.dim()):
        return _again(logits, x[args[0]], logits.dtype)
    return None


def _again(logits: LazyLogits, x: torch.Tensor, dtype: torch.dtype) -> LazyLogits:
    """The same product of other rows."""
    return LazyLogits.of(x, logits.weight, logits.bias, logits.product_dtype, dtype)


def _is_of_rows(index: Any, dims: int) -> bool:
    """Whether an index of numbers and slices, or one mask, leaves the last dimension whole."""
    if isinstance(index, torch.Tensor):
        return is_plain(index) and index.dtype is torch.bool and index.dim() < dims
    parts = index if isinstance(index, tuple) else (index,)
    if not all(type(p) in (int, slice) or p is Ellipsis for p in parts):
        return False
    whole = bool(parts) and type(parts[-1]) is slice and parts[-1] == slice(None)
    if sum(p is Ellipsis for p in parts):
        return parts[-1] is Ellipsis or whole
    return len(parts) < dims or whole


def _cross_entropy(
    logits: LazyLogits, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> torch.Tensor | None:  # fmt: skip
    """By chunks of logits; None where F.cross_entropy has settings that linear_cross_entropy lacks."""
    plain = (
        weights_fit(weight, logits, -1)
        and size_average is None
        and reduce is None
        and reduction in ("mean", "sum", "none")
    )
    fits = is_plain(target) and target.dtype is torch.int64 and logits.dim() == 2 and target.shape == logits.shape[:1]
    if not plain or not fits or logits.made is not None or target.device != logits.device or not logits.numel():
        return None
    settings: dict[str, Any] = dict(
        ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction, class_weight=weight
    )
    with _casting(logits.x.device.type, logits.product_dtype):
        loss = ops.linear_cross_entropy(logits.x, logits.weight, target, logits.bias, **settings)
    return loss.to(logits.dtype)


def _members(cls: type[nn.Linear]) -> dict[str, Any]:
    now = replacement(cls, "forward")

    def forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        if (other := now()) is not None:
            return other(self, input)
        if torch.compiler.is_compiling() or not self.training or not torch.is_grad_enabled() or left_to_torch():
            return cls.forward(self, input)
        weight, bias, product = self.weight, self.bias, autocast_dtype(input.device.type)
        parts = [t for t in (input, weight, bias) if t is not None]
        alike = all(is_plain(t) and t.device == input.device and t.dtype is input.dtype for t in parts)
        fits = alike and input.is_floating_point() and input.dim() > 1 and input.size(-1) == weight.size(1)
        if not fits or not any(t.requires_grad for t in parts):
            return cls.forward(self, input)
        return LazyLogits.of(input, weight, bias, product, product or input.dtype)

    return {"forward": forward}


def lazy_logits(model: nn.Module) -> nn.Module:
    """Let a language model make its logits on request in training, so that its loss needs a fraction of their memory.

    In training mode with gradients the head returns a `LazyLogits` [..., V], a tensor of its shape and dtype that has
    no memory. F.cross_entropy of it, or of rows of it (slices, .view(-1, V), .float()), is `ops.linear_cross_entropy`;
    whatever else is done computes the logits then, with their gradient. In evaluation and without gradients nothing
    changes. It is not part of `fuse`, since outputs change: `output.logits` is of another class, its first look costs a
    matrix product of its own, and a look after the optimizer's step is refused, as the weights are others then.
    DistributedDataParallel with find_unused_parameters looks at all outputs, and so computes them.

    Args:
        model: a model of transformers (its `get_output_embeddings()` is taken), or the head itself, an nn.Linear.

    Returns: The same object; `unfuse` undoes it.
    Raises TypeError: there is no nn.Linear as head, or its forward or hooks are not its own.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else model
    if not isinstance(head, nn.Module) or original(type(head)) is not nn.Linear or (why := obstacle(head)):
        found = type(head).__name__ + (f", and {why}" if original(type(head)) is nn.Linear else "")
        raise TypeError(
            f"lazy_logits: model: expected an nn.Linear, or a model whose get_output_embeddings() is one, got {found};"
            f" pass the head before it is wrapped"
        )
    if type(head) is nn.Linear:
        made = subclass(nn.Linear, nn.Linear, ("lazy logits",), lambda: _members(nn.Linear))
        object.__setattr__(head, "__class__", made)
    return model
