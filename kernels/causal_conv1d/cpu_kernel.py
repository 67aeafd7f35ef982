"""causal_conv1d on the CPU: allocates the results and calls cpu_kernel.cpp."""

import torch
import torch.nn.functional as F

from genai_fast.kernels.causal_conv1d.layout import (
    ACTIVATIONS,
    condition_strides,
    dense_condition,
    out_channels,
    require,
    sequences,
)
from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address

_CODE = {name: code for code, name in enumerate(ACTIVATIONS)}
_VECTOR = 16  # floats, of the widest instruction set
_GROUPS, _POSITIONS = 16, 192  # of a weight's gradient: parts that are summed by themselves, positions of a step
_MOST_SUMS = 1 << 24  # floats that these parts take


def _whole(matrices: torch.Tensor) -> torch.Tensor:
    """[..., C] float32, dense, with zeros up to whole vectors."""
    rest = -matrices.size(-1) % _VECTOR
    return F.pad(matrices.float(), (0, rest)).contiguous() if rest else matrices.float().contiguous()


def _convolve(x, matrices, bias, condition, y, z, columns, dilation, ahead, activation):
    """matrices [K, C, C_out] in float32, as cpu_kernel.cpp takes them."""
    x, matrices, condition = sequences(x, True), _whole(matrices), dense_condition(condition)
    bias = bias if bias is None else bias.float().contiguous()
    cpp.causal_conv1d(
        address(x), *x.stride(), DTYPE_CODE[x.dtype], address(matrices), address(bias), address(condition),
        *condition_strides(condition), address(y), address(z), *x.shape, columns, matrices.size(0), dilation, ahead,
        _CODE[activation],
    )  # fmt: skip


def causal_conv1d(x, weight, bias, condition, dilation, activation, keep):
    batch, length, columns = *x.shape[:2], weight.size(0)
    shape = (batch, columns) if condition is not None and condition.dim() == 2 else (batch, length, columns)
    require(x, weight, dilation, (bias, (columns,)), (condition, shape))
    y = x.new_empty((batch, length, out_channels(columns, activation)))
    z = x.new_empty((batch, length, columns)) if keep else x.new_empty(0)
    matrices = weight.permute(2, 1, 0)
    _convolve(x, matrices, bias, condition, y, z if keep else None, columns, dilation, False, activation)
    return y, z


def causal_conv1d_grad_input(grad_z, weight, dilation):
    require(grad_z, weight.transpose(0, 1), dilation)
    grad_x = grad_z.new_empty((*grad_z.shape[:2], weight.size(1)))
    _convolve(grad_z, weight.permute(2, 0, 1), None, None, grad_x, None, weight.size(1), dilation, True, "none")
    return grad_x


def causal_conv1d_grad_weight(grad_z, x, kernel, dilation):
    (batch, length, channels), columns = x.shape, grad_z.size(2)
    require(x, x.new_empty(1).expand(columns, channels, kernel), dilation, (grad_z, (batch, length, columns)))
    grad_z, x = sequences(grad_z.to(x.dtype), True), sequences(x, True)
    wide = channels + -channels % _VECTOR
    sums = torch.empty((kernel, columns, wide), dtype=torch.float32, device="cpu")
    tiles = batch * -(-length // _POSITIONS)
    groups = max(min(_GROUPS, tiles, _MOST_SUMS // sums.numel()), 1)
    cpp.causal_conv1d_grad_weight(
        address(grad_z), *grad_z.stride(), address(x), *x.stride(), DTYPE_CODE[x.dtype],
        address(sums), batch, length, channels, columns, kernel, dilation, groups,
    )  # fmt: skip
    return sums[..., :channels].permute(1, 2, 0).to(x.dtype).contiguous()


def causal_conv1d_gate_backward(grad_y, z, with_bias):
    half = z.size(2) // 2
    require(grad_y, grad_y.new_empty(1).expand(half, 1), 1, (z, (*grad_y.shape[:2], 2 * half)))
    grad_y, z = grad_y.to(z.dtype).contiguous(), z.contiguous()
    grad_z = torch.empty_like(z)
    sums = torch.empty(z.size(2) if with_bias else 0, dtype=torch.float32, device="cpu")
    cpp.causal_conv1d_gate_backward(
        address(grad_y), half, address(z), DTYPE_CODE[z.dtype], address(grad_z), address(sums) if with_bias else 0,
        z.size(0) * z.size(1), half,
    )  # fmt: skip
    return grad_z, sums


def depthwise_causal_conv1d(x, weight, bias, dilation, activation):
    require(x, weight, dilation, (bias, (x.size(2),)))
    x, taps, bias = (
        sequences(x, True),
        weight.float().T.contiguous(),
        bias if bias is None else bias.float().contiguous(),
    )
    y = x.new_empty(x.shape)
    cpp.depthwise_causal_conv1d(
        address(x), *x.stride(), DTYPE_CODE[x.dtype], address(taps), address(bias), address(y), *x.shape,
        taps.size(0), dilation, _CODE[activation],
    )  # fmt: skip
    return y


def depthwise_causal_conv1d_backward(grad_y, x, weight, bias, dilation, activation):
    require(x, weight, dilation, (bias, (x.size(2),)), (grad_y, tuple(x.shape)))
    x, grad_y = sequences(x, True), sequences(grad_y.to(x.dtype), True)
    taps, bias = weight.float().T.contiguous(), bias if bias is None else bias.float().contiguous()
    grad_x, (kernel, channels) = x.new_empty(x.shape), taps.shape
    sums = torch.empty((kernel + 1, channels), dtype=torch.float32, device="cpu")
    cpp.depthwise_causal_conv1d_backward(
        address(grad_y), *grad_y.stride(), address(x), *x.stride(), DTYPE_CODE[x.dtype],
        address(taps), address(bias), address(grad_x), address(sums), *x.shape, kernel, dilation, _CODE[activation],
    )  # fmt: skip
    return grad_x, sums[:-1].T.contiguous(), sums[-1].clone()
