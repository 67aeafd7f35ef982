"""conv_transpose in plain PyTorch: the definition, the fallback, and what serves the CPU (oneDNN's convolutions).

Everything is channels last, which oneDNN is fastest in; the backward formulas are differentiable. The convolutions
are those that autocast does not know: the dtype was chosen before. Where oneDNN has no convolution in a narrow type
they are computed in float32: PyTorch's own round at each tap, and took thirty times as long.
"""

import torch

from genai_fast.kernels.common import onednn
from genai_fast.kernels.common.activations import activate
from genai_fast.kernels.common.moments import statistics
from genai_fast.kernels.conv_transpose.shapes import channels_last, convolved, miscounted, one_pixel_wide


def conv_transpose(x, weight, bias, stride, padding, output_padding, activation, slope):
    """y = activate(conv_transpose(x, weight) + bias)."""
    if bias is not None:
        bias = bias.to(x.dtype)
    y = _convolution(x, weight, bias, stride, padding, True, output_padding)
    return channels_last(activate(y, activation, slope))


def conv_transpose_statistics(
    x, weight, bias, running_mean, running_var, momentum, eps, stride, padding, output_padding
):
    """(y, mean, sum of squared deviations, 1 / sqrt(variance + eps)) of y's channels; running statistics move."""
    y = conv_transpose(x, weight, bias, stride, padding, output_padding, "none", 0.0)
    return y, *statistics(y, running_mean, running_var, momentum, eps)


def conv_transpose_grad_input(grad_y, weight, size, stride, padding):
    """dx = conv(dy, weight); `size` is that of x's plane, which the other sizes give too."""
    return channels_last(_convolution(grad_y, weight, None, stride, padding, False, (0, 0)))


def conv_transpose_grad_weight(grad_y, x, kernel_size, stride, padding, as_channels_last):
    """dweight[ci, co, ky, kx] = sum over the pixels of x[pixel, ci] dy[pixel under the tap, co].

    It is the weight's gradient of the ordinary convolution that leads from dy's plane to x's.
    """
    shape = (x.size(1), grad_y.size(1), *kernel_size)
    if grad_y.is_cpu and miscounted(grad_y.size(1), kernel_size, stride) and tuple(padding) == (0, 0):
        (high, wide), (down, right) = x.shape[2:], stride
        grad_y, stride = grad_y[..., ::down, ::right][..., :high, :wide], (1, 1)
    narrow = grad_y.dtype
    if _widened(grad_y) or one_pixel_wide(grad_y, x.shape[2:]):
        grad_y, x = grad_y.float(), x.float()
    weight = grad_y.new_empty(1).expand(shape)  # of which only the shape is used
    gradient = torch.ops.aten.convolution_backward(
        channels_last(x), channels_last(grad_y), weight, None, stride, padding, (1, 1), False, (0, 0), 1,
        (False, True, False),
    )[1].to(narrow)  # fmt: skip
    return channels_last(gradient) if as_channels_last else gradient.contiguous()


def _convolution(x, weight, bias, stride, padding, transposed, output_padding):
    narrow = x.dtype
    one = not transposed and one_pixel_wide(x, convolved(x, weight.shape[2:], stride, padding))
    if _widened(x) or one:
        x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
    settings = (stride, padding, (1, 1), transposed, output_padding, 1)
    return torch.ops.aten.convolution(channels_last(x), weight, bias, *settings).to(narrow)


def _widened(x):
    return x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) and not onednn.serves(x.dtype)
