"""The nearest code of a codebook for each vector, and sums of vectors by code."""

from typing import Any

import torch

from genai_fast.backends import forced_backend
from genai_fast.ops import checks
from genai_fast.ops.dispatch import KernelFunction, backward_call, library_call
from genai_fast.ops.planned import planned
from genai_fast.precision import without_autocast

_MOST = 2**31 - 1  # codes that the kernels count


class _VectorQuantize(KernelFunction):
    @staticmethod
    def forward(x, codebook, backend):
        return library_call("vector_quantize", x, codebook, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, codebook, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.codes, ctx.dtype = codebook.size(0), codebook.dtype

    @staticmethod
    def backward(ctx, grad_quantized, _):
        (indices,) = ctx.saved_tensors
        sums, _ = backward_call("segment_sum", grad_quantized, indices, ctx.codes, ctx.backend)
        return dict(codebook=sums.to(ctx.dtype))


class _SegmentSum(KernelFunction):
    @staticmethod
    def forward(x, indices, segments, backend):
        return library_call("segment_sum", x, indices, segments, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, indices, ctx.segments, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(indices)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx, grad_sums, _):
        (indices,) = ctx.saved_tensors
        with_none = torch.cat((grad_sums, grad_sums.new_zeros(1, grad_sums.size(1))))  # for what is in no segment
        inside = (indices >= 0) & (indices < ctx.segments)
        return dict(x=with_none[torch.where(inside, indices, ctx.segments)].to(ctx.dtype))


@planned
def vector_quantize(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """indices = argmin over k of |x - codebook[k]|^2 and quantized = codebook[indices], without a matrix of distances.

    Of codes at the same distance the first is chosen. Distances are compared as x e - |e|^2 / 2 in float32, with
    products in full (never TF32): the chosen code is the nearest to within a few units in the last place of |x| |e|.
    If vectors and codes lie far from the origin, subtract their mean first: distances do not change. A distance that is
    NaN or that overflows is never the smallest; if all are, the first code is chosen.

    Args:
        x: [..., D], float32, bfloat16, float16 or float64, any strides.
        codebook: [K, D] with K > 0; the dtype of x, or float32 with a narrower x.

    Returns: quantized [..., D], dtype of the codebook; indices int64 [...]. Autocast changes neither.
    Gradients: the codebook, to any order: each code gets the sum over the vectors that chose it. x has none, since the
        choice is constant almost everywhere; `layers.VectorQuantizer` passes it straight through.
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64; it makes the matrix). Bitwise repeatable.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: van den Oord, Vinyals & Kavukcuoglu 2017 (VQ-VAE), arXiv:1711.00937.
    """
    op = "vector_quantize"
    _vectors(op, x)
    checks.is_floating(op, "codebook", codebook)
    checks.same_device(op, "codebook", codebook, "x", x)
    if codebook.dim() != 2 or codebook.size(1) != x.size(-1) or not 0 < codebook.size(0) <= _MOST:
        raise ValueError(
            f"{op}: codebook: expected [K, {x.size(-1)}] with K > 0 as x has {x.size(-1)} in its last dimension, got"
            f" {tuple(codebook.shape)}; channels of images are moved last by .movedim(1, -1)"
        )
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    if not (narrow and codebook.dtype is torch.float32):
        checks.same_dtype(op, "codebook", codebook, "x", x)
    with without_autocast(x.device.type):
        return _VectorQuantize.call(x, codebook, forced_backend())


@planned
def segment_sum(x: torch.Tensor, indices: torch.Tensor, segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sums[k] = sum of the rows x[n] with indices[n] = k, and counts[k], their number; without float atomics.

    Args:
        x: [..., D], float32, bfloat16, float16 or float64, any strides.
        indices: int64 [...]; a row with an index outside 0 .. segments - 1 belongs to no segment.
        segments: how many sums, at least 0.

    Returns: sums [segments, D] and counts [segments], float32, of a float64 x float64.
    Gradients: x, to any order.
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64). Bitwise repeatable.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: the sums of van den Oord et al. 2017, arXiv:1711.00937, appendix A.1.
    """
    op = "segment_sum"
    _vectors(op, x)
    if not isinstance(indices, torch.Tensor) or indices.dtype is not torch.int64:
        got = indices.dtype if isinstance(indices, torch.Tensor) else type(indices).__name__
        raise TypeError(f"{op}: indices: expected a tensor of torch.int64, got {got}; convert it with .long()")
    checks.same_device(op, "indices", indices, "x", x)
    if indices.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: indices: expected shape {tuple(x.shape[:-1])}, one for each row of x, got {tuple(indices.shape)};"
            f" reshape it"
        )
    segments = checks.integer(op, "segments", segments, 0)
    return _SegmentSum.call(x, indices, segments, forced_backend())


def _vectors(op: str, x: Any) -> None:
    checks.is_floating(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x: expected [..., D], got shape (); the last dimension is a vector's")
