"""GRU and LSTM layers over whole sequences, with nn.GRU's and nn.LSTM's weights."""

from typing import Any

import torch
import torch.nn.functional as F

from genai_fast.backends import forced_backend
from genai_fast.kernels.recurrent import reference
from genai_fast.ops import checks
from genai_fast.ops.dispatch import KernelFunction, differentiated_again, library_call, needs_graph, transformed
from genai_fast.precision import autocast_dtype


def _weight_gradient(grad: torch.Tensor, y: torch.Tensor, h0: torch.Tensor) -> torch.Tensor:
    """That of a weight whose products with the states before the steps, h0 and y[:-1], have the gradient `grad`."""
    return torch.addmm(grad[0].t() @ h0, grad[1:].flatten(0, 1).t(), y[:-1].flatten(0, 1))


class _Gru(KernelFunction):
    @staticmethod
    def forward(gates, h0, weight_hh, bias_n, keep, backend):
        return library_call("gru", gates, h0, weight_hh, bias_n, keep, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gates, h0, weight_hh, bias_n, _, ctx.backend = inputs
        y, _, saved = output
        ctx.save_for_backward(gates, h0, weight_hh, bias_n, y, saved)
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_y, grad_last, _):
        if grad_y is None and grad_last is None:
            return {}
        gates, h0, weight_hh, bias_n, y, saved = ctx.saved_tensors
        if differentiated_again():
            y, _, saved = reference.gru(gates, h0, weight_hh, bias_n, True)  # again: the saved ones carry no graph
            parts = reference.gru_backward(grad_y, grad_last, saved, y, h0, weight_hh)
        else:
            parts = library_call("gru_backward", grad_y, grad_last, saved, y, h0, weight_hh, ctx.backend)
        grad_gates, grad_n, grad_h0 = parts
        grad_weight = None
        if ctx.needs_input_grad[2]:
            of_r_and_z = grad_gates[..., : 2 * y.size(2)]
            grad_weight = torch.cat([_weight_gradient(g, y, h0) for g in (of_r_and_z, grad_n)])
        grad_bias = grad_n.sum((0, 1)) if ctx.needs_input_grad[3] else None
        return dict(gates=grad_gates, h0=grad_h0, weight_hh=grad_weight, bias_n=grad_bias)


class _Lstm(KernelFunction):
    @staticmethod
    def forward(gates, h0, c0, weight_hh, keep, backend):
        return library_call("lstm", gates, h0, c0, weight_hh, keep, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gates, h0, c0, weight_hh, _, ctx.backend = inputs
        y, _, _, saved = output
        ctx.save_for_backward(gates, h0, c0, weight_hh, y, saved)
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_y, grad_h, grad_c, _):
        if grad_y is None and grad_h is None and grad_c is None:
            return {}
        gates, h0, c0, weight_hh, y, saved = ctx.saved_tensors
        if differentiated_again():
            y, _, _, saved = reference.lstm(gates, h0, c0, weight_hh, True)
            parts = reference.lstm_backward(grad_y, grad_h, grad_c, saved, c0, weight_hh)
        else:
            parts = library_call("lstm_backward", grad_y, grad_h, grad_c, saved, c0, weight_hh, ctx.backend)
        grad_gates, grad_h0, grad_c0 = parts
        grad_weight = _weight_gradient(grad_gates, y, h0) if ctx.needs_input_grad[3] else None
        return dict(gates=grad_gates, h0=grad_h0, c0=grad_c0, weight_hh=grad_weight)


def _checked(op: str, gates: int, **given: Any) -> dict[str, Any]:
    """The arguments by name, in one dtype, states as zeros where they are None; all is known to fit."""
    for name in ("x", "weight_ih", "weight_hh"):
        checks.is_floating(op, name, given[name])
    x, weight_hh = given["x"], given["weight_hh"]
    if x.dim() != 3:
        raise ValueError(f"{op}: x: expected [T, B, I], got shape {tuple(x.shape)}; add a batch with .unsqueeze(1)")
    if x.size(0) < 1:
        raise ValueError(f"{op}: x: expected [T, B, I] with at least 1 step, got shape {tuple(x.shape)}; skip the call")
    if weight_hh.dim() != 2 or weight_hh.size(1) < 1 or weight_hh.size(0) != gates * weight_hh.size(1):
        raise ValueError(
            f"{op}: weight_hh: expected [{gates} H, H] with H of at least 1, got shape {tuple(weight_hh.shape)};"
            f" the {gates} gates come one after another"
        )
    rows, hidden = weight_hh.shape
    shapes = dict.fromkeys(("bias_ih", "bias_hh"), (rows,)) | dict.fromkeys(("h0", "c0"), (x.size(1), hidden))
    shapes["weight_ih"] = (rows, x.size(2))
    narrow = autocast_dtype(x.device.type)
    found: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            found[name] = None
            continue
        checks.is_floating(op, name, value)
        checks.same_device(op, name, value, "x", x)
        expected = shapes.get(name)
        if expected is not None and value.shape != expected:
            raise ValueError(
                f"{op}: {name}: expected shape {tuple(expected)} beside x {tuple(x.shape)} and weight_hh"
                f" {tuple(weight_hh.shape)}, got {tuple(value.shape)}; reshape it"
            )
        if narrow is not None and value.dtype is not torch.float64:
            value = value.to(narrow)
        else:
            checks.same_dtype(op, name, value, "x", x, ", or use torch.autocast")
        found[name] = value
    for name in ("h0", "c0"):
        if name in found and found[name] is None:
            found[name] = found["x"].new_zeros(shapes[name])
    return found


def gru(
    x: torch.Tensor,
    h0: torch.Tensor | None,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A GRU layer over a whole sequence. With W x[t] + b from weight_ih, bias_ih and V h + c from weight_hh, bias_hh,

        r = sigmoid(W_r x[t] + b_r + V_r h + c_r),  z = sigmoid(W_z x[t] + b_z + V_z h + c_z),
        n = tanh(W_n x[t] + b_n + r (V_n h + c_n)),  h = n + z (h - n),  y[t] = h.

    Args:
        x: [T, B, I], T >= 1, float32, bfloat16, float16 or float64, any strides.
        h0: [B, H], or None for zeros.
        weight_ih: [3 H, I], the gates in the order r, z, n, as in nn.GRU's weight_ih_l0.
        weight_hh: [3 H, H].
        bias_ih, bias_hh: [3 H], or None for 0.
        All have x's dtype and device; under autocast they are cast.

    Returns: (y [T, B, H], h_n [B, H]), dtype of x. The state itself is float32 (float64 for such an x): y is the state
        rounded, and it is y that meets weight_hh. h_n is a copy of y[-1].
    Gradients: all tensors, through y and h_n, to any order (the second and higher through plain PyTorch; torch.compile
        refuses those). Kept for backward: 8 H numbers a row of x.
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64). The products with x and the weights'
        gradients are PyTorch's. On CUDA the whole sequence is one launch where the weights fit on chip (README of
        kernels/recurrent), else a step is two; cuDNN's nn.GRU may well be faster, but has no second derivatives.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Cho et al. 2014, arXiv:1406.1078, with the reset gate applied as nn.GRU does.
    """
    a = _checked("gru", 3, x=x, h0=h0, weight_ih=weight_ih, weight_hh=weight_hh, bias_ih=bias_ih, bias_hh=bias_hh)
    bias, bias_n, hidden = a["bias_ih"], None, weight_hh.size(1)
    if bias_hh is not None:  # all of it but n's part may as well be added to W x
        of_r_and_z = F.pad(a["bias_hh"][: 2 * hidden], (0, hidden))
        bias = of_r_and_z if bias is None else bias + of_r_and_z
        bias_n = a["bias_hh"][2 * hidden :]
    gates = F.linear(a["x"], a["weight_ih"], bias)
    inputs = (gates, a["h0"], a["weight_hh"], bias_n)
    keep = needs_graph(inputs) or transformed()
    return _Gru.call(*inputs, keep, forced_backend())[:2]


def lstm(
    x: torch.Tensor,
    h0: torch.Tensor | None,
    c0: torch.Tensor | None,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An LSTM layer over a whole sequence. With a = weight_ih x[t] + bias_ih + weight_hh h + bias_hh in four parts,

        i = sigmoid(a_i),  f = sigmoid(a_f),  g = tanh(a_g),  o = sigmoid(a_o),
        c = f c + i g,  h = o tanh(c),  y[t] = h.

    Args:
        x: [T, B, I], T >= 1, float32, bfloat16, float16 or float64, any strides.
        h0, c0: [B, H], or None for zeros.
        weight_ih: [4 H, I], the gates in the order i, f, g, o, as in nn.LSTM's weight_ih_l0.
        weight_hh: [4 H, H].
        bias_ih, bias_hh: [4 H], or None for 0.
        All have x's dtype and device; under autocast they are cast.

    Returns: (y [T, B, H], h_n [B, H], c_n [B, H]), dtype of x. Between the steps the cell is float32 (float64 for such
        an x).
    Gradients: all tensors, through all results, to any order (the second and higher through plain PyTorch;
        torch.compile refuses those).
    Backends: torch.lstm (CPU, where oneDNN's is fast), Triton (CUDA, launched as gru is; cuDNN's nn.LSTM may well be
        faster, but has no second derivatives), reference (elsewhere).
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000.
    """
    a = _checked(
        "lstm", 4, x=x, h0=h0, c0=c0, weight_ih=weight_ih, weight_hh=weight_hh, bias_ih=bias_ih, bias_hh=bias_hh
    )
    bias = a["bias_ih"]
    if bias_hh is not None:
        bias = a["bias_hh"] if bias is None else bias + a["bias_hh"]
    h, c, weight, backend = a["h0"], a["c0"], a["weight_hh"], forced_backend()
    if x.is_cpu and not backend:  # as planned: there is no C++ kernel
        weights = (a["weight_ih"], weight) if bias is None else (a["weight_ih"], weight, bias, torch.zeros_like(bias))
        before = (h.unsqueeze(0), c.unsqueeze(0))
        y, h_n, c_n = torch.lstm(a["x"], before, weights, bias is not None, 1, 0.0, True, False, False)
        return y, h_n.squeeze(0), c_n.squeeze(0)
    inputs = (F.linear(a["x"], a["weight_ih"], bias), h, c, weight)
    keep = needs_graph(inputs) or transformed()
    return _Lstm.call(*inputs, keep, backend)[:3]
