"""gated_act on the CPU: allocates the results and calls cpu_kernel.cpp."""

import torch

from genai_fast.kernels.common.activations import ACTIVATION_CODE
from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address
from genai_fast.kernels.gated_act.layout import ACTIVATIONS, operands, results

_CODE = {name: ACTIVATION_CODE[name] for name in ACTIVATIONS}


def gated_act(x, up, bias, activation, gate_multiplier, down_multiplier):
    (gate, linear), bias, _ = operands(x, up, bias)
    y = x.new_empty(gate.shape)
    cpp.gated_act(
        address(gate), gate.stride(0), address(linear), linear.stride(0), DTYPE_CODE[x.dtype], address(y),
        *y.shape, address(bias), _CODE[activation], gate_multiplier, down_multiplier
    )  # fmt: skip
    return y


def gated_act_backward(grad_y, x, up, bias, with_bias, activation, gate_multiplier, down_multiplier):
    (gate, linear), bias, grad_y = operands(x, up, bias, grad_y)
    (grad_x, grad_up), (grad_gate, grad_linear) = results(x, up)
    grad_bias = x.new_empty(2 * gate.size(1) if with_bias else 0, dtype=torch.float32)
    cpp.gated_act_backward(
        address(grad_y), grad_y.stride(0), address(gate), gate.stride(0), address(linear), linear.stride(0),
        DTYPE_CODE[x.dtype], address(grad_gate), address(grad_linear), grad_gate.stride(0),
        address(grad_bias) if with_bias else 0, *gate.shape, address(bias), _CODE[activation],
        gate_multiplier, down_multiplier
    )  # fmt: skip
    return grad_x, grad_up, grad_bias
