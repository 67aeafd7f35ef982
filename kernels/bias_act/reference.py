"""bias_act in plain PyTorch: the definition, the fallback and the second derivatives."""

from genai_fast.kernels.common.activations import activate, derivative, derivative_from_output
from genai_fast.kernels.common.channels import dense_channels, like_layout, per_channel, reduced_dims, wide


def _shifted(x, bias):
    return x if bias is None else x + per_channel(bias, x)


def bias_act(x, bias, activation, slope):
    """y = activate(x + bias[c])."""
    x = dense_channels(x)
    y = like_layout(activate(_shifted(wide(x), bias), activation, slope).to(x.dtype), x)
    return y.clone() if y is x else y


def bias_act_backward(grad_y, saved, bias, from_output, with_bias, activation, slope):
    """(dx = dy act'(x + bias), its sum by channel or nothing); `saved` is x, or y if from_output."""
    dense = dense_channels(saved)
    s = wide(dense)
    if from_output:
        factor = derivative_from_output(s, activation, slope)
    else:
        factor = derivative(_shifted(s, bias), activation, slope)
    dx = wide(grad_y) * factor
    return like_layout(dx.to(dense.dtype), dense), dx.sum(reduced_dims(s)) if with_bias else s.new_empty(0)
