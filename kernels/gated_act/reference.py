"""gated_act in plain PyTorch: the definition, the fallback and the second derivatives."""

import torch

from genai_fast.kernels.common.activations import activate, derivative
from genai_fast.kernels.common.channels import wide


def halves(x: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, up): x itself and its partner, or the halves of x's rows, in place."""
    return x.chunk(2, -1) if up is None else (x, up)


def shifted(x, up, bias):
    """gate + bias and up + bias in float32 (float64), of bias's two halves."""
    gate, up = map(wide, halves(x, up))
    if bias is None:
        return gate, up
    gate_bias, up_bias = bias.chunk(2)
    return gate + gate_bias, up + up_bias


def gated_act(x, up, bias, activation, gate_multiplier, down_multiplier):
    """y = d activate(m (gate + bias)) (up + bias)."""
    gate, linear = shifted(x, up, bias)
    y = activate(gate * gate_multiplier, activation, 0.0) * linear * down_multiplier
    return y.to(x.dtype).contiguous()


def gated_act_backward(grad_y, x, up, bias, with_bias, activation, gate_multiplier, down_multiplier):
    """(dx, dup or nothing, dbias or nothing); dx holds both gradients where x holds both halves."""
    gate, linear = shifted(x, up, bias)
    gate, dy = gate * gate_multiplier, wide(grad_y) * down_multiplier
    grads = ((dy * linear) * derivative(gate, activation, 0.0) * gate_multiplier, dy * activate(gate, activation, 0.0))
    grad_bias = torch.cat([g.sum(0) for g in grads]) if with_bias else gate.new_empty(0)
    if up is None:
        return torch.cat(grads, 1).to(x.dtype), x.new_empty(0), grad_bias
    return *(g.to(x.dtype).contiguous() for g in grads), grad_bias
