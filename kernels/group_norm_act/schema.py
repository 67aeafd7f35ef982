"""The library ops of group_norm_act: schemas, fakes, and which backends serve them."""

import torch

from genai_fast.kernels.common.channels import dense_channels
from genai_fast.kernels.common.schema import LibraryOp, wide_dtype


def _forward(x, groups, *rest):
    y = torch.empty_like(dense_channels(x))
    return y, *(x.new_empty(x.size(0), groups, dtype=wide_dtype(x)) for _ in range(2))


def _backward(grad_y, x, groups, weight, bias, scale, shift, beside, *rest):
    grad_x = torch.empty_like(dense_channels(x))
    sums = (x.new_empty(x.shape[:2], dtype=wide_dtype(x)) for _ in range(2))
    return grad_x, x.new_empty(0) if beside is None else torch.empty_like(grad_x), *sums


LIBRARY = (
    LibraryOp(
        "group_norm_act_forward(Tensor x, SymInt groups, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift,"
        " Tensor? residual, bool after, float eps, str activation, float slope, str backend)"
        " -> (Tensor y, Tensor mean, Tensor rstd)",
        _forward,
    ),
    LibraryOp(
        "group_norm_act_backward(Tensor grad_y, Tensor x, SymInt groups, Tensor? weight, Tensor? bias, Tensor? scale,"
        " Tensor? shift, Tensor? beside, bool from_output, Tensor mean, Tensor rstd, str activation, float slope,"
        " str backend)"
        " -> (Tensor grad_x, Tensor dz, Tensor sum_dz, Tensor sum_dz_x_hat)",
        _backward,
    ),
)
