"""Convolution of an image, whose input's gradient is a transposed convolution to few channels."""

import torch
import torch.nn.functional as F

from genai_fast.backends import LIBRARIES, choose, forced_backend
from genai_fast.kernels.conv_transpose.shapes import convolved, miscounted, one_pixel_wide
from genai_fast.ops import checks
from genai_fast.ops.conv_transpose import Ints, cast
from genai_fast.ops.dispatch import KernelFunction, backward_call
from genai_fast.precision import autocast_dtype

_OP = "conv2d"


class _Conv2d(KernelFunction):
    @staticmethod
    def forward(x, weight, bias, stride, padding, backend):
        narrow = x.dtype
        if one_pixel_wide(x, convolved(x, weight.shape[2:], stride, padding)):
            x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
        return torch.ops.aten.convolution(x, weight, bias, stride, padding, (1, 1), False, (0, 0), 1).to(narrow)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.stride, ctx.padding, ctx.backend = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needed[0]:
            arguments = _transposed(x, weight, grad_y, ctx.stride, ctx.padding)
            grad_x = backward_call("conv_transpose", *arguments, ctx.backend)
        if needed[1] or needed[2]:
            stride, narrow = ctx.stride, x.dtype
            if one_pixel_wide(x, grad_y.shape[2:]):
                x, grad_y, weight = x.float(), grad_y.float(), weight.float()
            if x.is_cpu and miscounted(x.size(1), weight.shape[2:], stride) and tuple(ctx.padding) == (0, 0):
                x, stride = x[..., :: stride[0], :: stride[1]], (1, 1)
            _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad_y, x, weight, [weight.size(0)], stride, ctx.padding, (1, 1), False, (0, 0), 1,
                (False, needed[1], needed[2]),
            )  # fmt: skip
            grad_weight, grad_bias = (g if g is None else g.to(narrow) for g in (grad_weight, grad_bias))
        return dict(x=grad_x, weight=grad_weight, bias=grad_bias)


def _transposed(x, weight, grad_y, stride, padding):
    """The arguments of conv_transpose that give x's gradient; x's size is one of those that the stride reduces."""
    sizes = zip(x.shape[2:], grad_y.shape[2:], weight.shape[2:], stride, padding, strict=True)
    more = tuple(h - ((o - 1) * s - 2 * p + k) for h, o, k, s, p in sizes)
    return grad_y, weight, None, stride, padding, more, "none", 0.0


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: Ints = 1, padding: Ints = 0
) -> torch.Tensor:
    """F.conv2d with groups and dilation 1, for images: made for few input channels, a discriminator's first layer.

    PyTorch computes the result and the weight's gradient; x's gradient, which a generator's step asks for, is the
    transposed convolution to few channels.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        weight: [C_out, C, KH, KW], dtype of x.
        bias: [C_out] or None for 0; dtype of x.
        stride, padding: ints or pairs, for H and W.

    Returns: y [N, C_out, OH, OW], dtype of x; the strides are those that F.conv2d gives. Under autocast all are cast.
    Gradients: x (in channels_last memory), weight and bias, to any order (the second and higher through plain PyTorch;
        torch.compile refuses those).
    Backends: x's gradient: C++ (CPU) up to 8 channels, Triton (CUDA); PyTorch for the rest: `serves` says why.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Dumoulin & Visin 2016, arXiv:1603.07285.
    """
    checks.is_floating(_OP, "x", x)
    checks.is_floating(_OP, "weight", weight)
    if x.dim() != 4 or weight.dim() != 4 or weight.size(1) != x.size(1):
        raise ValueError(
            f"{_OP}: expected x [N, C, H, W] and weight [C_out, C, KH, KW], got shapes {tuple(x.shape)} and"
            f" {tuple(weight.shape)}; C is the same in both"
        )
    checks.same_device(_OP, "weight", weight, "x", x)
    stride, padding = checks.sizes(_OP, "stride", stride, 2, 1), checks.sizes(_OP, "padding", padding, 2, 0)
    for h, k, p in zip(x.shape[2:], weight.shape[2:], padding, strict=True):
        if h + 2 * p < k:
            raise ValueError(
                f"{_OP}: weight: expected a kernel of at most {h} + 2 x {p} lines, as x has with its padding, got {k};"
                f" use more padding"
            )
    x, weight = cast(_OP, x, weight)
    if bias is not None:
        bias = bias if autocast_dtype(x.device.type) is None else bias.to(x.dtype)
        checks.per_channel(_OP, {"bias": bias}, x, weight.size(0))
        checks.same_dtype(_OP, "bias", bias, "x", x)
    return _Conv2d.call(x, weight, bias, stride, padding, forced_backend())


def serves(x: torch.Tensor, weight: torch.Tensor, stride: Ints = 1, padding: Ints = 0) -> str:
    """Why x's gradient is left to PyTorch; "" if a kernel of ours computes it.

    Args:
        x, weight, stride, padding: as in conv2d, and such as conv2d takes.
    """
    stride, padding = checks.sizes(_OP, "stride", stride, 2, 1), checks.sizes(_OP, "padding", padding, 2, 0)
    backend, reason = choose("conv_transpose", forced_backend(), x.device.type, x.dtype)
    if backend == "reference":
        return reason or "the reference was asked for"
    # Sizes alone count: y's numbers need not exist.
    with torch.no_grad():
        y = F.conv2d(x.to("meta"), weight.to("meta"), None, stride, padding)
    return LIBRARIES["conv_transpose"].refuses(backend, *_transposed(x, weight, y, stride, padding))
