"""conv_transpose to few channels on the CPU: allocates the results and calls cpu_kernel.cpp."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.activations import ACTIVATION_CODE
from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address
from genai_fast.kernels.conv_transpose.shapes import (
    FEW_CHANNELS,
    LARGEST_KERNEL,
    LARGEST_STRIDE,
    channels_last,
    empty_channels_last,
    output_size,
)


def _require(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Sequence[int]) -> None:
    """Raise unless the kernels serve these: they read by address. The public op has checked the rest already."""
    if x.dtype not in DTYPE_CODE or x.device.type != "cpu" or weight.device != x.device:
        raise ValueError(
            f"conv_transpose: x and weight: expected float32, bfloat16 or float16 on the CPU, got {x.dtype} on"
            f" {x.device} and a weight on {weight.device}"
        )
    if x.dim() != 4 or weight.dim() != 4 or x.size(1) != weight.size(0):
        raise ValueError(
            "conv_transpose: x and weight: expected [N, C, H, W] and [C, C_out, KH, KW], got"
            f" {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    few, *kernel = weight.shape[1:]
    if not 1 <= few <= FEW_CHANNELS:
        raise ValueError(f"conv_transpose: weight: expected 1 to {FEW_CHANNELS} output channels, got {few}")
    if not 1 <= min(kernel) <= max(kernel) <= LARGEST_KERNEL:
        raise ValueError(f"conv_transpose: weight: expected kernel sizes of 1 to {LARGEST_KERNEL}, got {kernel}")
    if len(stride) != 2 or not 1 <= min(stride) <= max(stride) <= LARGEST_STRIDE:
        raise ValueError(f"conv_transpose: stride: expected two of 1 to {LARGEST_STRIDE}, got {list(stride)}")
    if bias is not None and (bias.shape != (few,) or bias.device != x.device):
        raise ValueError(
            f"conv_transpose: bias: expected ({few},) on {x.device}, got {tuple(bias.shape)} on {bias.device}"
        )


def _require_gradient(grad_y, x, weight_shape, stride, padding) -> None:
    """Raise unless grad_y is the gradient of a result that x gives, with some output_padding."""
    planes = zip(grad_y.shape[2:], x.shape[2:], weight_shape[2:], stride, padding, strict=True)
    over = [out - ((size - 1) * s - 2 * p + k) for out, size, k, s, p in planes]
    fits = all(0 <= more < s for more, s in zip(over, stride, strict=True))
    alike = grad_y.dtype is x.dtype and grad_y.device == x.device
    if not fits or not alike or grad_y.shape[:2] != (x.size(0), weight_shape[1]) or min(padding) < 0:
        raise ValueError(
            f"conv_transpose: grad_y: expected the gradient of a result of x {x.dtype} {tuple(x.shape)}, weight"
            f" {tuple(weight_shape)}, stride {list(stride)} and padding {list(padding)}, got {grad_y.dtype}"
            f" {tuple(grad_y.shape)}"
        )


def _extents(y, x, kernel_size) -> tuple[int, ...]:
    """N, C, C_out, H, W, OH, OW, KH, KW."""
    return (*x.shape[:2], y.size(1), *x.shape[2:], *y.shape[2:], *kernel_size)


def _output_size(x, weight, stride, padding, output_padding) -> list[int]:
    out = list(output_size(x.shape[2:], weight.shape[2:], stride, padding, output_padding))
    if min(padding) < 0 or min(output_padding) < 0 or min(out) < 1 or min(x.shape[1:]) < 1:
        raise ValueError(
            f"conv_transpose: padding: expected a result of at least 1 pixel, got {out} from x {tuple(x.shape)},"
            f" weight {tuple(weight.shape)}, padding {list(padding)} and output_padding {list(output_padding)}"
        )
    return out


def _image(x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """x with channels, or pixels of a row, one beside the other, and its strides; copies only other layouts.

    A single channel lies beside itself, whatever its stride; so does a single pixel.
    """
    strides = list(x.stride())
    for dim in (1, 3):
        if strides[dim] == 1 or x.size(dim) == 1:
            strides[dim] = 1
            return x, strides
    x = x.contiguous()
    return x, list(x.stride())


def conv_transpose(x, weight, bias, stride, padding, output_padding, activation, slope):
    _require(x, weight, bias, stride)
    out = _output_size(x, weight, stride, padding, output_padding)
    x, strides = _image(x)
    weight = weight.float()
    bias = bias if bias is None else bias.float().contiguous()
    y = empty_channels_last(x, x.size(0), weight.size(1), *out)
    cpp.conv_transpose(
        address(x), DTYPE_CODE[x.dtype], *strides, address(weight), *weight.stride(), address(bias),
        address(y), *_extents(y, x, weight.shape[2:]), *stride, *padding, ACTIVATION_CODE[activation], slope
    )  # fmt: skip
    return y


def conv_transpose_grad_input(grad_y, weight, size, stride, padding):
    """grad_x [N, C, *size], channels_last."""
    x = grad_y.new_empty(1).expand(grad_y.size(0), weight.size(0), *size)  # of which only the shape is used
    _require(x, weight, None, stride)
    _require_gradient(grad_y, x, weight.shape, stride, padding)
    grad_y = channels_last(grad_y)
    rows = weight.float().permute(2, 3, 1, 0).reshape(-1, x.size(1))
    rows = F.pad(rows, (0, -x.size(1) % 16)).contiguous()  # whole vectors of any instruction set
    grad_x = empty_channels_last(grad_y, *x.shape)
    cpp.conv_transpose_grad_input(
        address(grad_y), DTYPE_CODE[grad_y.dtype], address(rows), rows.size(1), address(grad_x),
        *_extents(grad_y, x, weight.shape[2:]), *stride, *padding
    )  # fmt: skip
    return grad_x


def conv_transpose_grad_weight(grad_y, x, kernel_size, stride, padding, as_channels_last=False):
    """grad_weight [C, C_out, *kernel_size], contiguous or channels_last."""
    shape = (x.size(1), grad_y.size(1), *kernel_size)
    _require(x, x.new_empty(1).expand(shape), None, stride)
    _require_gradient(grad_y, x, shape, stride, padding)
    grad_y = channels_last(grad_y)
    x, strides = _image(x)
    gradient = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
    cpp.conv_transpose_grad_weight(
        address(grad_y), DTYPE_CODE[x.dtype], address(x), *strides, address(gradient),
        *_extents(grad_y, x, kernel_size), *stride, *padding
    )  # fmt: skip
    gradient = gradient.to(x.dtype)
    return gradient if as_channels_last else gradient.contiguous()
