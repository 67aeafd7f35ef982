"""The library ops of bias_act: schemas, fakes, and which backends serve them."""

import torch

from genai_fast.kernels.common.channels import dense_channels
from genai_fast.kernels.common.schema import LibraryOp, wide_dtype


def _fake_backward(grad_y, saved, bias, from_output, with_bias, activation, slope):
    dtype = wide_dtype(saved)
    return torch.empty_like(dense_channels(saved)), saved.new_empty(saved.size(1) if with_bias else 0, dtype=dtype)


LIBRARY = (
    LibraryOp(
        "bias_act(Tensor x, Tensor? bias, str activation, float slope, str backend) -> Tensor",
        lambda x, *rest: torch.empty_like(dense_channels(x)),
    ),
    LibraryOp(
        "bias_act_backward(Tensor grad_y, Tensor saved, Tensor? bias, bool from_output, bool with_bias, str activation,"
        " float slope, str backend) -> (Tensor grad_x, Tensor grad_bias)",
        _fake_backward,
    ),
)
