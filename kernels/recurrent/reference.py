"""gru and lstm in plain PyTorch: the definition, the fallback and the second derivatives.

They begin with the gates from the input, W_ih x + b, which are computed before for all steps at once. The state is
float32 or wider; y is the state rounded to the gates' dtype, and it is y that meets weight_hh.
"""

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.channels import wide


def require(like: torch.Tensor, *expected: tuple[torch.Tensor | None, tuple[int, ...]]) -> None:
    """Raise unless each tensor is None or has its shape, on like's device: kernels read and write by address.

    The public ops have checked already, with better words; this is for calls of torch.ops.genai_fast itself.
    """
    for x, shape in expected:
        if x is not None and (x.shape != shape or x.device != like.device):
            raise ValueError(
                f"genai_fast: expected {tuple(shape)} on {like.device}, got {tuple(x.shape)} on {x.device}"
            )


def _products(y: torch.Tensor, weight_hh: torch.Tensor, gates: int) -> tuple[torch.Tensor, ...]:
    return F.linear(wide(y), wide(weight_hh)).chunk(gates, -1)


def gru(gates, h0, weight_hh, bias_n, keep):
    """y [T, B, H], h_n [B, H], saved [T, B, 4 H]: r, z, n and the state's part of n; gates [T, B, 3 H] of r, z, n."""
    state, h, results, saved = wide(h0), h0, [], []
    for r_x, z_x, n_x in (step.chunk(3, -1) for step in wide(gates).unbind()):
        r_h, z_h, n_h = _products(h, weight_hh, 3)
        n_h = n_h if bias_n is None else n_h + wide(bias_n)
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        n = torch.tanh(n_x + r * n_h)
        state = n + z * (state - n)
        h = state.to(gates.dtype)
        results.append(h)
        saved.append(torch.cat((r, z, n, n_h), -1))
    return torch.stack(results), h.clone(), torch.stack(saved) if keep else state.new_empty(0)


def gru_backward(grad_y, grad_last, saved, y, h0, weight_hh):
    """Gradients of the gates [T, B, 3 H], of the state's part of n [T, B, H], and of h0."""
    grad = torch.zeros_like(wide(h0)) if grad_last is None else wide(grad_last)
    grad_gates, grad_n = [], []
    for t in reversed(range(y.size(0))):
        r, z, n, n_h = saved[t].chunk(4, -1)
        before = wide(y[t - 1] if t else h0)
        if grad_y is not None:
            grad = grad + wide(grad_y[t])
        d_n = grad * (1.0 - z) * (1.0 - n * n)
        d_r, d_z = d_n * n_h * (r * (1.0 - r)), grad * (before - n) * (z * (1.0 - z))
        grad_gates.append(torch.cat((d_r, d_z, d_n), -1))
        grad_n.append(d_n * r)
        grad = grad * z + torch.cat((d_r, d_z, d_n * r), -1) @ wide(weight_hh)
    return torch.stack(grad_gates[::-1]).to(y.dtype), torch.stack(grad_n[::-1]).to(y.dtype), grad.to(y.dtype)


def lstm(gates, h0, c0, weight_hh, keep):
    """y [T, B, H], h_n, c_n [B, H], saved [T, B, 5 H]: i, f, g, o and the cell c; gates [T, B, 4 H] of i, f, g, o."""
    c, h, results, saved = wide(c0), h0, [], []
    for step in wide(gates).unbind():
        parts = zip(step.chunk(4, -1), _products(h, weight_hh, 4), strict=True)
        i, f, g, o = (x + p for x, p in parts)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c = f * c + i * g
        h = (o * torch.tanh(c)).to(gates.dtype)
        results.append(h)
        saved.append(torch.cat((i, f, g, o, c), -1))
    last = c.to(gates.dtype)
    return torch.stack(results), h.clone(), last.clone(), torch.stack(saved) if keep else c.new_empty(0)


def lstm_backward(grad_y, grad_h, grad_c, saved, c0, weight_hh):
    """Gradients of the gates [T, B, 4 H], of h0 and of c0."""
    grad = torch.zeros_like(wide(c0)) if grad_h is None else wide(grad_h)
    carry = torch.zeros_like(wide(c0)) if grad_c is None else wide(grad_c)
    grad_gates = []
    for t in reversed(range(saved.size(0))):
        i, f, g, o, c = saved[t].chunk(5, -1)
        before = saved[t - 1].chunk(5, -1)[4] if t else wide(c0)
        if grad_y is not None:
            grad = grad + wide(grad_y[t])
        a = torch.tanh(c)
        carry = carry + grad * o * (1.0 - a * a)
        step = torch.cat(
            (
                carry * g * (i * (1.0 - i)),
                carry * before * (f * (1.0 - f)),
                carry * i * (1.0 - g * g),
                grad * a * (o * (1.0 - o)),
            ),
            -1,
        )
        grad_gates.append(step)
        carry = carry * f
        grad = step @ wide(weight_hh)
    dtype = weight_hh.dtype
    return torch.stack(grad_gates[::-1]).to(dtype), grad.to(dtype), carry.to(dtype)
