"""The library ops of layer_norm and rms_norm: schemas, fakes, and which backends serve them."""

import torch

from genai_fast.kernels.common.rows import dense_like
from genai_fast.kernels.common.schema import LibraryOp, wide_dtype


def _fake(x, residual, weight, bias, rms, eps, casting):
    of_rows = x.new_empty(x.shape[:-1], dtype=wide_dtype(x))
    return (
        dense_like(x),
        x.new_empty(0) if residual is None else dense_like(x),
        of_rows.new_empty(0) if rms else of_rows,
        torch.empty_like(of_rows),
    )


def _fake_backward(grad_y, grad_h, h, weight, mean, rstd, with_weight, with_bias, rms, casting):
    sums = (h.new_empty(h.size(-1) if wanted else 0, dtype=wide_dtype(h)) for wanted in (with_weight, with_bias))
    return dense_like(h), *sums


LIBRARY = (
    LibraryOp(
        "layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, bool rms, float eps, str casting,"
        " str backend)"
        " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
        _fake,
    ),
    LibraryOp(
        "layer_norm_backward(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor? weight, Tensor mean, Tensor rstd,"
        " bool with_weight, bool with_bias, bool rms, str casting, str backend)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        _fake_backward,
    ),
)
