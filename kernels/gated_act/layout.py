"""How gated_act's kernels see their tensors: gate and up [rows, columns] with strided rows, perhaps halves of one."""

import torch

from genai_fast.kernels.common.rows import as_rows, require_alike
from genai_fast.kernels.gated_act.reference import halves

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "sigmoid", "relu", "tanh", "none")  # of gates, as in cpu_kernel.cpp


def operands(x, up, bias, grad_y=None):
    """((gate, up), bias, grad_y), columns side by side; raises on what would read foreign memory."""
    if x.dim() != 2 or (up is None and x.size(1) % 2):
        raise ValueError(f"genai_fast: expected [rows, 2 D], or [rows, D] beside its partner, got {tuple(x.shape)}")
    require_alike(x, up)
    gate, linear = (as_rows(half)[0] for half in halves(x, up))
    require_alike(gate, grad_y)
    if bias is not None:
        if bias.shape != (2 * gate.size(1),) or bias.dtype is not torch.float32 or bias.device != x.device:
            raise ValueError(
                f"genai_fast: expected a bias of torch.float32 ({2 * gate.size(1)},) on {x.device}, got {bias.dtype}"
                f" {tuple(bias.shape)} on {bias.device}"
            )
        bias = bias.contiguous()
    return (gate, linear), bias, grad_y if grad_y is None else as_rows(grad_y)[0]


def results(x, up):
    """Uninitialised (grad_x, grad_up or nothing), and what of them is the gate's and the up's."""
    grad_x = x.new_empty(x.shape)
    grad_up = x.new_empty(0 if up is None else up.shape)
    return (grad_x, grad_up), halves(grad_x, None if up is None else grad_up)
