"""Convolutions of small feature maps on a CPU, as matrix products of their unfolded patches.

oneDNN's convolutions are made for long rows. For 256 to 512 channels, kernel 4, stride 2, 8 x 8 to 4 x 4, batch 64, its
forward, input's and weight's gradients take 35, 39 and 50 ms in float32 and 18, 23 and 62 ms in bfloat16 (two cores
with AMX); the products here 23, 23, 24 and 13, 6, 9 ms, and the unfolding 2 ms.
"""

from collections.abc import Sequence

import torch

from genai_fast.backends import is_batched
from genai_fast.fusion.operands import Convolution, memory_format
from genai_fast.kernels.conv_transpose.shapes import empty_channels_last
from genai_fast.ops.dispatch import KernelFunction, differentiated_again
from genai_fast.precision import autocast_dtype

MOST_POSITIONS = 64  # of the smaller feature map: with more, oneDNN has long enough rows
MOST_ELEMENTS = 1 << 25  # in the unfolded patches


def why_not(conv: Convolution, x: torch.Tensor) -> str:
    """Why unfolded patches are not worth measuring for a convolution of x [N, C, H, W]; "" if they are."""
    if not x.is_cpu:
        return "it is for CPU tensors"
    if not conv.is_default:
        return "groups, dilation or padding other than numbers of zeros"
    if x.size(1) != conv.channels[0]:
        return "the channels do not match"
    small = x.shape[2:] if conv.transposed else conv.output_plane(x)
    positions = small[0] * small[1]
    if not 0 < positions <= MOST_POSITIONS:
        return f"{positions} positions are not 1 to {MOST_POSITIONS}"
    elements = len(x) * positions * conv.weight[0].numel()
    return "" if elements <= MOST_ELEMENTS else f"{elements} elements of patches are more than {MOST_ELEMENTS}"


def convolved(conv: Convolution, x: torch.Tensor) -> torch.Tensor:
    """conv(x), in channels_last memory; under autocast in its dtype."""
    weight, bias = conv.weight, conv.bias
    if dtype := autocast_dtype("cpu"):
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    y = _Patches.call(x, weight, conv.stride, conv.padding, conv.output_padding if conv.transposed else None)
    return y if bias is None else y + bias.view(-1, 1, 1)


class _Patches(KernelFunction):
    """A convolution's forward, and one of its gradients, are the other's of the transposed convolution."""

    @staticmethod
    def forward(x, weight, stride, padding, output_padding):
        if output_padding is None:
            return _gather(x, weight, stride, padding)
        sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, output_padding, strict=True)
        return _spread(x, weight, stride, padding, [(h - 1) * s - 2 * p + k + more for h, k, s, p, more in sizes])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.stride, ctx.padding, ctx.output_padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        stride, padding, transposed = ctx.stride, ctx.padding, ctx.output_padding is not None
        needed = (*ctx.needs_input_grad[:2], False)
        if differentiated_again() or is_batched(grad_y):  # to be differentiated again, or many at once: PyTorch's
            grads = torch.ops.aten.convolution_backward(
                grad_y, x, weight, None, stride, padding, (1, 1), transposed, ctx.output_padding or (0, 0), 1, needed
            )
            return {"x": grads[0], "weight": grads[1]}
        grad_x = grad_weight = None
        large, small = (grad_y, x) if transposed else (x, grad_y)
        if needed[0]:
            settings = (weight, stride, padding)
            grad_x = _gather(large, *settings) if transposed else _spread(small, *settings, x.shape[2:])
        if needed[1]:
            grad_weight = _matrix(small).t() @ _columns(large, weight.shape[2:], stride, padding, small.shape[2:])
            grad_weight = grad_weight.view(len(weight), *weight.shape[2:], -1).permute(0, 3, 1, 2)
            grad_weight = grad_weight.contiguous(memory_format=memory_format(weight))
        return {"x": grad_x, "weight": grad_weight}


def _gather(x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int]) -> torch.Tensor:
    """The convolution of x [N, C, H, W] with weight [O, C, KH, KW]: patches times weights, [N, O, OH, OW]."""
    size = _reduced(x.shape[2:], weight.shape[2:], stride, padding)
    # Not a view of the product: what comes after may change it in place.
    y = empty_channels_last(x, len(x), len(weight), *size)
    torch.mm(_columns(x, weight.shape[2:], stride, padding, size), _matrix(weight, rows=1).t(), out=_matrix(y))
    return y


def _spread(
    g: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int], size: Sequence[int]
) -> torch.Tensor:
    """The transposed convolution of g [N, O, h, w] with weight [O, C, KH, KW]: patches, added up in [N, C, *size]."""
    (n, _, h, w), (_, c, kh, kw) = g.shape, weight.shape
    patches = (_matrix(g) @ _matrix(weight, rows=1)).view(n, h, w, kh, kw, c)
    ends = [(a - 1) * s + k for a, s, k in zip((h, w), stride, (kh, kw), strict=True)]
    border = [max(end, p + a) for end, p, a in zip(ends, padding, size, strict=True)]
    # One rounding to a narrow type at the end, as a convolution has.
    wide = torch.float32 if g.dtype in (torch.bfloat16, torch.float16) else g.dtype
    total = torch.zeros(n, *border, c, dtype=wide, device=g.device)
    for i in range(kh):
        rows = slice(i, i + (h - 1) * stride[0] + 1, stride[0])
        for j in range(kw):
            total[:, rows, j : j + (w - 1) * stride[1] + 1 : stride[1]] += patches[:, :, :, i, j]
    inner = total[:, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]
    return empty_channels_last(g, n, c, *size).copy_(inner.permute(0, 3, 1, 2))


def _columns(
    x: torch.Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], size: Sequence[int]
) -> torch.Tensor:
    """Patches of x [N, C, H, W] at `size` positions: [N OH OW, KH KW C]."""
    n, c, h, w = x.shape
    (top, left), (oh, ow) = padding, size
    wide = x.new_zeros(n, h + 2 * top, w + 2 * left, c)
    wide[:, top : top + h, left : left + w] = x.permute(0, 2, 3, 1)
    each, row, column, one = wide.stride()
    steps = (each, row * stride[0], column * stride[1], row, column, one)
    return wide.as_strided((n, oh, ow, *kernel, c), steps).reshape(n * oh * ow, -1)


def _matrix(x: torch.Tensor, rows: int = 3) -> torch.Tensor:
    """[A, C, H, W] -> [A H W, C], or with rows=1 [A, H W C]; a view of channels_last memory."""
    last = x.permute(0, 2, 3, 1)
    return last.reshape(len(x), -1) if rows == 1 else last.reshape(-1, x.size(1))


def _reduced(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """Sizes that a convolution leaves of sizes."""
    sizes = zip(size, kernel, stride, padding, strict=True)
    return tuple((h + 2 * p - k) // s + 1 if h + 2 * p >= k else 0 for h, k, s, p in sizes)
