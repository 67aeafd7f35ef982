"""The library ops of conv_transpose: schemas, fakes, and which backends serve them."""

import torch

from genai_fast.kernels.common.schema import LibraryOp, wide_dtype
from genai_fast.kernels.conv_transpose.shapes import empty_channels_last, not_served, output_size

_KERNELS = ("triton",)  # on the CPU PyTorch's own convolutions (oneDNN) are the fast ones, but for few channels


def _fake_forward(x, weight, bias, stride, padding, output_padding, *activation):
    out = output_size(x.shape[2:], weight.shape[2:], stride, padding, output_padding)
    return empty_channels_last(x, x.size(0), weight.size(1), *out)


def _fake_statistics(x, weight, bias, running_mean, running_var, momentum, eps, *geometry):
    y = _fake_forward(x, weight, bias, *geometry)
    dtype = wide_dtype(x)
    return y, *(y.new_empty(y.size(1), dtype=dtype) for _ in range(3))


def _fake_grad_weight(grad_y, x, kernel_size, stride, padding, as_channels_last):
    grad = empty_channels_last(x, x.size(1), grad_y.size(1), *kernel_size)
    return grad if as_channels_last else torch.empty_like(grad, memory_format=torch.contiguous_format)


def _refuses_forward(backend, x, weight, bias, stride, padding, output_padding, *activation):
    out = output_size(x.shape[2:], weight.shape[2:], stride, padding, output_padding)
    y = (x.size(0), weight.size(1), *out)
    return not_served(x.shape, y, weight.shape[2:], stride, few=backend == "cpu")


def _refuses_statistics(backend, x, weight, bias, running_mean, running_var, momentum, eps, *geometry):
    return _refuses_forward(backend, x, weight, bias, *geometry)


def _refuses_grad_input(backend, grad_y, weight, size, stride, padding):
    x = (grad_y.size(0), weight.size(0), *size)
    return not_served(x, grad_y.shape, weight.shape[2:], stride, few=backend == "cpu")


def _refuses_grad_weight(backend, grad_y, x, kernel_size, stride, padding, as_channels_last):
    return not_served(x.shape, grad_y.shape, kernel_size, stride, few=backend == "cpu")


CONVOLUTION = (
    LibraryOp(
        "conv_transpose(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] output_padding,"
        " str activation, float slope, str backend) -> Tensor",
        _fake_forward, ("cpu", "triton"), _refuses_forward,
    ),
    LibraryOp(
        "conv_transpose_grad_input(Tensor grad_y, Tensor weight, SymInt[] size, int[] stride, int[] padding,"
        " str backend) -> Tensor",
        lambda grad_y, weight, size, *rest: empty_channels_last(grad_y, grad_y.size(0), weight.size(0), *size),
        ("cpu", "triton"), _refuses_grad_input,
    ),
    LibraryOp(
        "conv_transpose_grad_weight(Tensor grad_y, Tensor x, SymInt[] kernel_size, int[] stride, int[] padding,"
        " bool as_channels_last, str backend) -> Tensor",
        _fake_grad_weight, ("cpu", "triton"), _refuses_grad_weight,
    ),
)  # fmt: skip
STATISTICS = LibraryOp(
    "conv_transpose_statistics(Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, float momentum, float eps, int[] stride, int[] padding, int[] output_padding,"
    " str backend) -> (Tensor y, Tensor mean, Tensor squares, Tensor rstd)",
    _fake_statistics,
    _KERNELS,
    _refuses_statistics,
)
LIBRARY = (*CONVOLUTION, STATISTICS)
