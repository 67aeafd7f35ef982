"""gru on the CPU: in float32, by cpu_kernel.cpp. lstm is PyTorch's there."""

import torch

from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address
from genai_fast.kernels.recurrent.reference import require


def _float32(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None else x.to(torch.float32).contiguous()


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def gru(gates, h0, weight_hh, bias_n, keep):
    steps, (batch, hidden) = gates.size(0), h0.shape
    require(gates, (gates, (steps, batch, 3 * hidden)), (weight_hh, (3 * hidden, hidden)), (bias_n, (hidden,)))
    require(gates, (h0, (batch, hidden)))
    x, h, weight, bias = map(_float32, (gates, h0, weight_hh, bias_n))
    y = _empty(steps, batch, hidden)
    saved = _empty(steps, batch, 4 * hidden) if keep else None
    state = None if gates.dtype is torch.float32 else h.clone()
    cpp.gru(*map(address, (x, h, weight, bias, y, state, saved)), steps, batch, hidden, DTYPE_CODE[gates.dtype])
    y = y.to(gates.dtype)
    return y, y[-1].clone(), _empty(0) if saved is None else saved


def gru_backward(grad_y, grad_last, saved, y, h0, weight_hh):
    steps, (batch, hidden) = y.size(0), h0.shape
    sizes, state = (steps, batch, hidden), (batch, hidden)
    require(y, (y, sizes), (grad_y, sizes), (grad_last, state), (h0, state), (weight_hh, (3 * hidden, hidden)))
    require(y, (saved, (steps, batch, 4 * hidden)))
    given = tuple(map(_float32, (grad_y, grad_last, saved, y, h0, weight_hh)))
    results = _empty(steps, batch, 3 * hidden), _empty(*sizes), _empty(*state)
    cpp.gru_backward(*map(address, (*given, *results)), *sizes)
    return tuple(g.to(y.dtype) for g in results)
