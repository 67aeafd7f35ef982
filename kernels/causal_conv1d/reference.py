"""causal_conv1d in plain PyTorch: the definition, the fallback and the second derivatives. x and results are [N, L, C].

The convolutions are those that autocast does not know: the dtype was chosen before. On a CPU those in a narrow type are
computed in float32: oneDNN's read beyond sequences in bfloat16 (kernels/conv_transpose/shapes.py).
"""

import torch
import torch.nn.functional as F

from genai_fast.kernels.causal_conv1d.layout import GATED, padding
from genai_fast.kernels.common.activations import activate, derivative
from genai_fast.kernels.common.channels import wide


def activated(z, activation):
    """activation(z) of z [..., C], in float32 or wider."""
    if activation != GATED:
        return activate(wide(z), activation, 0.0)
    a, b = wide(z).chunk(2, -1)
    return torch.tanh(a) * torch.sigmoid(b)


def causal_conv1d(x, weight, bias, condition, dilation, activation, keep):
    """(activation(z), z if it is kept, else nothing), z = conv(x) + bias + condition."""
    z = _convolution(F.pad(x.mT, (padding(weight.size(2), dilation), 0)), weight, bias, dilation)
    if condition is not None:
        z = z + (condition if condition.dim() == 3 else condition.unsqueeze(1))
    y = activated(z, activation).to(x.dtype).contiguous()
    return y, z.contiguous() if keep else x.new_empty(0)


def causal_conv1d_gate_backward(grad_y, z, with_bias):
    """(dz, its sums over all positions or nothing) of y = tanh(a) sigmoid(b), z [N, L, 2 C]."""
    a, b = wide(z).chunk(2, -1)
    t, s, dy = torch.tanh(a), torch.sigmoid(b), wide(grad_y)
    grad_z = torch.cat([dy * s * (1 - t * t), dy * t * s * (1 - s)], -1)
    return grad_z.to(z.dtype), grad_z.sum((0, 1)) if with_bias else grad_z.new_empty(0)


def causal_conv1d_grad_input(grad_z, weight, dilation):
    """dx[l] = sum over the taps of dz[l + how far the tap looks back] weight[:, :, tap]."""
    ahead = F.pad(grad_z.mT, (0, padding(weight.size(2), dilation)))
    return _convolution(ahead, weight.flip(2).transpose(0, 1), None, dilation).contiguous()


def causal_conv1d_grad_weight(grad_z, x, kernel, dilation):
    """dweight[co, ci, k] = sum over the positions of dz[l, co] times what tap k sees there of channel ci."""
    narrow = x.dtype
    if x.is_cpu:
        grad_z, x = wide(grad_z), wide(x)
    rows = grad_z.reshape(-1, grad_z.size(2))
    taps = [seen.reshape(-1, x.size(2)) for seen in _taps(x, kernel, dilation)]
    return torch.stack([rows.T @ seen for seen in taps], 2).to(narrow)


def depthwise_causal_conv1d(x, weight, bias, dilation, activation):
    """activation(z), z[l, c] = sum over the taps of x[l - how far it looks back, c] weight[c, tap] + bias[c]."""
    return activated(_depthwise(x, weight, bias, dilation), activation).to(x.dtype).contiguous()


def depthwise_causal_conv1d_backward(grad_y, x, weight, bias, dilation, activation):
    """(dx, dweight, dbias), the last two in float32 or wider."""
    kernel, dz = weight.size(1), wide(grad_y)
    if activation != "none":
        dz = dz * derivative(_depthwise(x, weight, bias, dilation), activation, 0.0)
    ahead = F.pad(dz, (0, 0, 0, padding(kernel, dilation)))
    back = [ahead[:, padding(kernel - k, dilation) :][:, : x.size(1)] for k in range(kernel)]
    grad_x = sum(g * w for g, w in zip(back, wide(weight).unbind(1), strict=True))
    grad_weight = torch.stack([(dz * seen).sum((0, 1)) for seen in _taps(wide(x), kernel, dilation)], 1)
    return grad_x.to(x.dtype).contiguous(), grad_weight, dz.sum((0, 1))


def _taps(x, kernel, dilation):
    """What each tap sees, [N, L, C] each: x moved on, with zeros before it."""
    before = F.pad(x, (0, 0, padding(kernel, dilation), 0))
    return [before[:, k * dilation :][:, : x.size(1)] for k in range(kernel)]


def _depthwise(x, weight, bias, dilation):
    taps = zip(_taps(wide(x), weight.size(1), dilation), wide(weight).unbind(1), strict=True)
    z = sum(seen * w for seen, w in taps)
    return z if bias is None else z + bias


def _convolution(x, weight, bias, dilation):
    """[N, C, L] -> [N, L', C_out]."""
    narrow = x.dtype
    if x.is_cpu:
        x, weight = wide(x), wide(weight)
    bias = bias if bias is None else bias.to(x.dtype)
    y = torch.ops.aten.convolution(x, weight, bias, (1,), (0,), (dilation,), False, (0,), 1)
    return y.mT.to(narrow)
