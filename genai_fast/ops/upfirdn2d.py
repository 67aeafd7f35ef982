"""Resampling of images by an FIR filter: upsample, filter and downsample in one pass."""

from typing import Any

import torch

from genai_fast.backends import forced_backend
from genai_fast.kernels.common.channels import wide
from genai_fast.kernels.upfirdn2d.layout import axes, gradient_padding, output_size, taps_of
from genai_fast.ops import checks
from genai_fast.ops.conv_transpose import Ints
from genai_fast.ops.dispatch import KernelFunction, differentiated_again, library_call
from genai_fast.ops.planned import planned

_OP = "upfirdn2d"


class _Upfirdn2d(KernelFunction):
    @staticmethod
    def forward(x, filter, up, down, padding, gain, flip, backend):
        return library_call("upfirdn2d", x, filter, up, down, padding, gain, flip, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, filter, ctx.up, ctx.down, padding, ctx.gain, ctx.flip, ctx.backend = inputs
        ctx.padding = gradient_padding(*axes(x, filter, ctx.up, ctx.down, padding))
        ctx.save_for_backward(filter)

    @staticmethod
    def backward(ctx, grad_y):
        (filter,) = ctx.saved_tensors
        arguments = (grad_y, filter, ctx.down, ctx.up, ctx.padding, ctx.gain, not ctx.flip, ctx.backend)
        again = differentiated_again()
        return dict(x=_Upfirdn2d.call(*arguments) if again else library_call("upfirdn2d", *arguments))


@planned
def upfirdn2d(
    x: torch.Tensor,
    filter: torch.Tensor,
    up: Ints = 1,
    down: Ints = 1,
    padding: Ints = 0,
    gain: float = 1.0,
    flip: bool = False,
) -> torch.Tensor:
    """Upsample by inserting zeros, pad or crop, convolve each channel with a filter, keep every down-th pixel.

    y[n, c, oy, ox] = gain sum over ky and kx of g[ky, kx] z[n, c, oy down + ky - top, ox down + kx - left], where z is
    x with up - 1 zeros after each pixel and 0 outside, and g the filter turned by 180 degrees: a convolution in the
    mathematical sense. Inserted zeros exist in the definition alone.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, any strides; contiguous and channels_last need no copy.
        filter: [FH, FW], or [F] for its outer product with itself, which is applied along one dimension after the
            other; float32 or the dtype of x. It is a constant: no gradient.
        up, down: ints or pairs, for H and W, at least 1.
        padding: (left, right, top, bottom) pixels of zeros around the upsampled image, or an int for all; below 0 they
            are cropped.
        gain: factor of the result; an upsampled image keeps its brightness with up^2 and a filter whose sum is 1.
        flip: do not turn the filter: a correlation.

    Returns: y [N, C, OH, OW], dtype and memory layout of x, OH = (H up + top + bottom - FH) // down + 1. Sums in
        float32 at least.
    Gradients: x, to any order: the gradient is an upfirdn2d with up and down exchanged.
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64). Bitwise repeatable.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Karras et al. 2020 (StyleGAN2), arXiv:1912.04958; polyphase: Vaidyanathan 1993.
    """
    checks.is_floating(_OP, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{_OP}: x: expected [N, C, H, W], got shape {tuple(x.shape)}; add a batch with .unsqueeze(0)")
    _check_filter(filter, x)
    ups, downs = checks.sizes(_OP, "up", up, 2, 1), checks.sizes(_OP, "down", down, 2, 1)
    around = checks.sizes(_OP, "padding", padding, 4, -(2**31))
    gain, flip = checks.real(_OP, "gain", gain, "a finite float"), checks.flag(_OP, "flip", flip)
    out = output_size(x.shape[2:], taps_of(filter), ups, downs, around)
    if min(*x.shape[1:], *out) < 1:
        raise ValueError(
            f"{_OP}: padding: expected a result of at least 1 pixel, got {out} from x {tuple(x.shape)}, filter"
            f" {tuple(filter.shape)}, up {up}, down {down} and padding {padding}; use more padding or a larger image"
        )
    return _Upfirdn2d.call(x, wide(filter), ups, downs, around, gain, flip, forced_backend())


def _check_filter(filter: Any, x: torch.Tensor) -> None:
    checks.is_floating(_OP, "filter", filter)
    if filter.dim() not in (1, 2) or not filter.numel():
        raise ValueError(f"{_OP}: filter: expected [FH, FW] or [F] with numbers, got shape {tuple(filter.shape)}")
    checks.same_device(_OP, "filter", filter, "x", x)
    if filter.dtype is not torch.float32 and filter.dtype is not x.dtype:
        raise TypeError(
            f"{_OP}: filter: expected torch.float32 or {x.dtype} as x has, got {filter.dtype}; convert it with .float()"
        )
    if filter.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{_OP}: filter: expected a constant, got one that requires a gradient; pass filter.detach()")
