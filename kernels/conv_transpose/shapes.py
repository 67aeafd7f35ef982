"""Sizes and memory of conv_transpose's tensors, all channels last, and which calls its kernels serve."""

from collections.abc import Sequence

import torch

FEW_CHANNELS = 8  # output channels up to which kernels of their own pay: an image's, not a layer's
LARGEST_KERNEL, LARGEST_STRIDE = 6, 2


def output_size(
    plane: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
) -> tuple[int, ...]:
    """(H - 1) stride - 2 padding + kernel + output_padding, for each dimension."""
    sizes = zip(plane, kernel, stride, padding, output_padding, strict=True)
    return tuple((h - 1) * s - 2 * p + k + more for h, k, s, p, more in sizes)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W] in memory [N, H, W, C]; itself if it lies so."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised [N, C, H, W] in memory [N, H, W, C]."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def miscounted(channels: int, kernel: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether oneDNN may get the weight's gradient wrong, or never end, in channels last (its issue 6035).

    A 1 x 1 kernel with a stride over fewer channels than a vector holds overruns a buffer.

    Args:
        channels: of the larger plane, a convolution's input.
    """
    return tuple(kernel) == (1, 1) and max(stride) > 1 and channels < 16


def one_pixel_wide(x: torch.Tensor, y: Sequence[int]) -> bool:
    """Whether a convolution of x to planes of sizes y, or its weight's gradient, must be computed in float32.

    oneDNN's in bfloat16 reads beyond images of one pixel in a dimension, or has columns of garbage in results that are
    one pixel wide (with AMX and a stride): wrong numbers, or NaN.
    """
    return x.is_cpu and x.dtype is torch.bfloat16 and (1 in x.shape[2:] or 1 in y)


def convolved(x: torch.Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """The plane's sizes of a convolution's result."""
    sizes = zip(x.shape[2:], kernel, stride, padding, strict=True)
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in sizes]


def not_served(
    x: Sequence[int], y: Sequence[int], kernel: Sequence[int], stride: Sequence[int], few: bool = False
) -> str:
    """Why the kernels leave tensors of these shapes [N, C, H, W] to PyTorch; "" if they serve them.

    Args:
        few: of the C++ kernels, which are for few output channels alone.
    """
    if few and y[1] > FEW_CHANNELS:
        return f"{y[1]} output channels are more than {FEW_CHANNELS}"
    if max(stride) > LARGEST_STRIDE:
        return f"stride {tuple(stride)} is larger than {LARGEST_STRIDE}"
    if max(kernel) > LARGEST_KERNEL:
        return f"kernel {tuple(kernel)} is larger than {LARGEST_KERNEL}"
    # Kernels count pixels, and numbers within a tile (some samples of a small plane), in 32 bits.
    if any(n * h * w >= 2**31 or c * max(h * w, 2048) >= 2**29 for n, c, h, w in (x, y)):
        return "the tensors have 2**31 pixels, 2**29 numbers a sample or 2**18 channels, or more"
    if x[1] * x[2] * x[3] * (1 + 2048 // max(y[2] * y[3], 1)) >= 2**31:
        return "the padding crops a large plane to a few pixels"
    if x[1] * y[1] * kernel[0] * kernel[1] >= 2**31:
        return "the weight has 2**31 numbers or more"
    return ""
