"""The calls that are measured, on small tensors, and the one that they are compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from genai_fast import ops, registry
from genai_fast.kernels.common.spec import Tensors

Call = Callable[[], object]
ROWS, COLUMNS, BLOCK = 64, 768, 1024
# Whose arguments are written into, or whose calls are long programs of their own.
_LEFT_OUT = ("adam_step", "gpt_decode", "linear_cross_entropy", "llama_decode", "gru", "lstm", "wavenet_decode")


@triton.jit
def _layer_norm(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,  # [rows, columns], [columns] twice, ..., [rows] twice
    x_stride, y_stride, columns, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) rstd weight + bias, one row a program."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < columns
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / columns
    d = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, axis=0) / columns + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    weight, bias = tl.load(weight_ptr + offs, mask=mask), tl.load(bias_ptr + offs, mask=mask)
    tl.store(y_ptr + row * y_stride + offs, (d * rstd * weight + bias).to(y_ptr.dtype.element_ty), mask=mask)


class _LayerNorm(torch.autograd.Function):
    """As Liger-Kernel writes its ops: three allocations and a launch in forward, nothing checked."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        rows, columns = x.shape
        y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
        mean = torch.empty(rows, dtype=torch.float32, device=x.device)
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        _layer_norm[(rows,)](
            x, weight, bias, y, mean, rstd, x.stride(0), y.stride(0), columns, eps, BLOCK=BLOCK, num_warps=4
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        raise NotImplementedError("host_path: forward alone is measured")


def liger_like(device: torch.device, grad: bool) -> Call:
    """A call of that Function on [ROWS, COLUMNS] in bfloat16."""
    x, weight, bias = _normed(Tensors(torch.bfloat16, device))
    return functools.partial(_LayerNorm.apply, x.requires_grad_(grad), weight, bias, 1e-5)


def _normed(t: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = Tensors(torch.float32, t.device)
    return t.normal(ROWS, COLUMNS), wide.normal(COLUMNS), wide.normal(COLUMNS)


def _block(t: Tensors, channels: int, size: int) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Channels-last images, weight and bias of a norm, its running statistics."""
    wide = Tensors(torch.float32, t.device)
    running = [wide.normal(channels, grad=False), wide.uniform(channels)]
    return t.laid_out("channels_last", 8, 64, size, size), [wide.normal(channels), wide.normal(channels)], running


def _batch_norm(t: Tensors) -> tuple[Any, ...]:
    x, parameters, running = _block(t, 64, 8)
    return x, *parameters, *running, True


def _block_of_a_generator(t: Tensors) -> tuple[Any, ...]:
    x, parameters, running = _block(t, 32, 8)
    weight = t.laid_out("channels_last", 64, 32, 4, 4)
    return x, weight, None, *parameters, *running, 0.1, 1e-5, 2, 1


# Arguments by position, as models pass them; the ops that are not here are called as their first case is.
_ARGUMENTS: dict[str, Callable[[Tensors], tuple[Any, ...]]] = {
    "layer_norm": _normed,
    "rms_norm": lambda t: _normed(t)[:2],
    "swiglu": lambda t: (t.normal(ROWS, 2 * COLUMNS),),
    "reparameterize": lambda t: (t.normal(128, 20), t.normal(128, 20)),
    "bias_gelu": lambda t: (_normed(t)[0], _normed(t)[2]),
    "cross_entropy": lambda t: (t.normal(ROWS, 1000), torch.randint(1000, (ROWS,)).to(t.device)),
    "causal_attention": lambda t: tuple(t.normal(2, 4, 64, 64) for _ in range(3)),
    "batch_norm_act": _batch_norm,
    "conv_transpose2d_batch_norm_act": _block_of_a_generator,
}


NAMES = tuple(dict.fromkeys(name for name in (*_ARGUMENTS, *registry.OPS) if name not in _LEFT_OUT))


def calls(device: torch.device, only: list[str], grad: bool) -> dict[str, Call]:
    """A call of each op; without `grad` of all ops, with it of those that have gradients."""
    found: dict[str, Call] = {}
    for name in NAMES:
        if only and name not in only:
            continue
        tensors = Tensors(torch.bfloat16, device)
        if name in _ARGUMENTS:
            found[name] = functools.partial(getattr(ops, name), *_ARGUMENTS[name](tensors))
        elif not name.startswith("decode") or not grad:
            found[name] = functools.partial(getattr(ops, name), **registry.OPS[name].cases[0].inputs(tensors))
    return found
