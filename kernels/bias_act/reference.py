"""bias_act in plain PyTorch: the definition, the fallback and the second derivatives."""

from genai_fast.kernels.common.activations import activate, derivative, derivative_by_slope, derivative_from_output
from genai_fast.kernels.common.channels import dense_channels, like_layout, per_channel, reduced_dims, wide


def _shifted(x, bias):
    return x if bias is None else x + per_channel(bias, x)


def _slope(slopes, slope, x):
    return slope if slopes is None else per_channel(slopes, x)


def bias_act(x, bias, slopes, activation, slope):
    """y = activate(x + bias[c])."""
    x = dense_channels(x)
    y = activate(_shifted(wide(x), bias), activation, _slope(slopes, slope, x))
    y = like_layout(y.to(x.dtype), x)
    return y.clone() if y is x else y


def bias_act_backward(grad_y, saved, bias, slopes, from_output, with_bias, activation, slope):
    """(dx = dy act'(x + bias), its sum by channel or nothing, the gradient of the slopes or nothing); `saved` is x, or
    y if from_output."""
    dense = dense_channels(saved)
    s = wide(dense)
    z = s if from_output else _shifted(s, bias)
    of_z = derivative_from_output if from_output else derivative
    dx = wide(grad_y) * of_z(z, activation, _slope(slopes, slope, s))
    grad_slopes = s.new_empty(0)
    if slopes is not None:
        by_slope = derivative_by_slope(wide(grad_y), z)
        grad_slopes = by_slope.sum().view(1) if slopes.numel() == 1 else by_slope.sum(reduced_dims(s))
    grad_bias = dx.sum(reduced_dims(s)) if with_bias else s.new_empty(0)
    return like_layout(dx.to(dense.dtype), dense), grad_bias, grad_slopes
