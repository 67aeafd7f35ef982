"""The library ops of bias_act: schemas, fakes, and which backends serve them."""

import torch

from genai_fast.kernels.common.channels import dense_channels
from genai_fast.kernels.common.schema import LibraryOp, wide_dtype


def _fake_backward(grad_y, saved, bias, slopes, from_output, with_bias, activation, slope):
    dtype, channels = wide_dtype(saved), saved.size(1)
    sizes = (channels if with_bias else 0, 0 if slopes is None else slopes.numel())
    sums = (saved.new_empty(size, dtype=dtype) for size in sizes)
    return torch.empty_like(dense_channels(saved)), *sums


LIBRARY = (
    LibraryOp(
        "bias_act(Tensor x, Tensor? bias, Tensor? slopes, str activation, float slope, str backend) -> Tensor",
        lambda x, *rest: torch.empty_like(dense_channels(x)),
    ),
    LibraryOp(
        "bias_act_backward(Tensor grad_y, Tensor saved, Tensor? bias, Tensor? slopes, bool from_output, bool with_bias,"
        " str activation, float slope, str backend) -> (Tensor grad_x, Tensor grad_bias, Tensor grad_slopes)",
        _fake_backward,
    ),
)
