"""The library ops of batch_norm_act: schemas, fakes, and which backends serve them."""

import torch

from genai_fast.kernels.common.channels import dense_channels
from genai_fast.kernels.common.schema import LibraryOp, wide_dtype


def _channel_vectors(x, count):
    return tuple(x.new_empty(x.size(1), dtype=wide_dtype(x)) for _ in range(count))


def _reduced(grad_y, x, weight, bias, slopes, mean, rstd, beside, *rest):
    dz = x.new_empty(0) if beside is None else torch.empty_like(dense_channels(x))
    grad_slopes = x.new_empty(0 if slopes is None else x.size(1), dtype=wide_dtype(x))
    return *_channel_vectors(x, 2), dz, grad_slopes


LIBRARY = (
    LibraryOp(
        "batch_norm_statistics(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps,"
        " str backend) -> (Tensor mean, Tensor squares, Tensor rstd)",
        lambda x, *settings: _channel_vectors(x, 3),
    ),
    LibraryOp(
        "batch_norm_act_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor? slopes, Tensor mean, Tensor rstd,"
        " Tensor? residual, bool after, str activation, float slope, str backend) -> Tensor",
        lambda x, *rest: torch.empty_like(dense_channels(x)),
    ),
    LibraryOp(
        "batch_norm_act_reduce(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? slopes, Tensor mean,"
        " Tensor rstd, Tensor? beside, bool from_output, str activation, float slope, str backend)"
        " -> (Tensor sum_dz, Tensor sum_dz_x_hat, Tensor dz, Tensor grad_slopes)",
        _reduced,
    ),
    LibraryOp(
        "batch_norm_act_grad(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? slopes, Tensor mean,"
        " Tensor rstd, Tensor? sum_dz, Tensor? sum_dz_x_hat, SymInt count, str activation, float slope, str backend)"
        " -> Tensor",
        lambda grad_y, x, *rest: torch.empty_like(dense_channels(x)),
    ),
)
