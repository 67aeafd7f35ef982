"""The library ops of causal_conv1d: schemas, fakes, and which backends serve them. x and results are [N, L, C]."""

from genai_fast.kernels.causal_conv1d.layout import LARGEST_KERNEL, out_channels
from genai_fast.kernels.common.schema import LibraryOp, wide_dtype


def _fake_dense(x, weight, bias, condition, dilation, activation, keep):
    y = x.new_empty((x.size(0), x.size(1), out_channels(weight.size(0), activation)))
    return y, x.new_empty((x.size(0), x.size(1), weight.size(0)) if keep else (0,))


def _fake_depthwise_backward(grad_y, x, weight, bias, dilation, activation):
    dtype = wide_dtype(x)
    channels = x.new_empty(x.size(2), dtype=dtype)
    return x.new_empty(x.shape), x.new_empty(weight.shape, dtype=dtype), channels


def _refuses_dense(backend, x, weight, bias, condition, dilation, activation, keep):
    return _too_large(x, weight.size(0), weight.size(1), weight.size(2), dilation)


def _refuses_grad_input(backend, grad_z, weight, dilation):
    return _too_large(grad_z, weight.size(1), weight.size(0), weight.size(2), dilation)


def _refuses_grad_weight(backend, grad_z, x, kernel, dilation):
    return _too_large(x, grad_z.size(2), x.size(2), kernel, dilation)


def _too_large(x, out, channels, kernel, dilation):
    """Why the kernels leave such sizes to PyTorch: they count what is in a sample, and all positions, in 32 bits."""
    batch, length = x.shape[:2]
    if length * max(out, channels, x.stride(1)) >= 2**31 or batch * length >= 2**31 - 2**10:
        return "a sample has 2**31 numbers, or there are as many positions, or more"
    if out * channels * kernel >= 2**31 or kernel * dilation >= 2**31:
        return "the weight or the padding has 2**31 numbers or more"
    return ""


def _refuses_depthwise(backend, x, weight, bias, dilation, activation):
    if weight.size(1) > LARGEST_KERNEL:
        return f"kernel {weight.size(1)} is larger than {LARGEST_KERNEL}"
    return _too_large(x, 1, x.size(2), weight.size(1), dilation)


DENSE = (
    LibraryOp(
        "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? condition, int dilation, str activation,"
        " bool keep, str backend) -> (Tensor y, Tensor z)",
        _fake_dense, refuses=_refuses_dense,
    ),
    LibraryOp(
        "causal_conv1d_gate_backward(Tensor grad_y, Tensor z, bool with_bias, str backend)"
        " -> (Tensor grad_z, Tensor grad_bias)",
        lambda grad_y, z, with_bias: (
            z.new_empty(z.shape), z.new_empty(z.size(2) if with_bias else 0, dtype=wide_dtype(z))
        ),
    ),
    LibraryOp(
        "causal_conv1d_grad_input(Tensor grad_z, Tensor weight, int dilation, str backend) -> Tensor",
        lambda grad_z, weight, dilation: grad_z.new_empty((grad_z.size(0), grad_z.size(1), weight.size(1))),
        refuses=_refuses_grad_input,
    ),
    LibraryOp(
        "causal_conv1d_grad_weight(Tensor grad_z, Tensor x, SymInt kernel, int dilation, str backend) -> Tensor",
        lambda grad_z, x, kernel, dilation: x.new_empty((grad_z.size(2), x.size(2), kernel)),
        refuses=_refuses_grad_weight,
    ),
)  # fmt: skip
DEPTHWISE = (
    LibraryOp(
        "depthwise_causal_conv1d(Tensor x, Tensor weight, Tensor? bias, int dilation, str activation, str backend)"
        " -> Tensor",
        lambda x, *rest: x.new_empty(x.shape), refuses=_refuses_depthwise,
    ),
    LibraryOp(
        "depthwise_causal_conv1d_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, int dilation,"
        " str activation, str backend) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        _fake_depthwise_backward,
        refuses=lambda backend, grad_y, *rest: _refuses_depthwise(backend, *rest),
    ),
)  # fmt: skip
LIBRARY = (*DENSE, *DEPTHWISE)
