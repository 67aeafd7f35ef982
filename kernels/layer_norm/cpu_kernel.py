"""layer_norm and rms_norm on the CPU: allocates the results and calls cpu_kernel.cpp."""

import torch

from genai_fast.kernels.common.channels import require_channels
from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address, as_matrix, dense_like, require_alike, require_rows

_CASTING = {"gemma": 0, "llama": 1, "none": 2}  # as in cpu_kernel.cpp


def _casting_of(x, casting):
    return 0 if x.dtype is torch.float32 else _CASTING[casting]


def layer_norm(x, residual, weight, bias, rms, eps, casting):
    require_alike(x, residual)
    matrix, stride = as_matrix(x)
    weight, bias = require_channels(matrix, weight, bias)
    added, added_stride = (None, 0) if residual is None else as_matrix(residual)
    y, h = dense_like(x), x.new_empty(0) if residual is None else dense_like(x)
    mean, rstd = (x.new_empty(shape, dtype=torch.float32) for shape in (0 if rms else x.shape[:-1], x.shape[:-1]))
    cpp.layer_norm(
        address(matrix), stride, address(added), added_stride, DTYPE_CODE[x.dtype], address(y), address(h),
        address(weight), address(bias), 0 if rms else address(mean), address(rstd), *matrix.shape, eps,
        _casting_of(x, casting)
    )  # fmt: skip
    return y, h, mean, rstd


def layer_norm_backward(grad_y, grad_h, h, weight, mean, rstd, with_weight, with_bias, rms, casting):
    require_alike(h, grad_y, grad_h)
    require_rows(h, None if rms else mean, rstd)
    matrix, stride = as_matrix(h)
    (weight,) = require_channels(matrix, weight)
    dy, dy_stride = as_matrix(grad_y)
    dh, dh_stride = (None, 0) if grad_h is None else as_matrix(grad_h)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    grad_x, columns = dense_like(h), h.size(-1)
    sums = [h.new_empty(columns if wanted else 0, dtype=torch.float32) for wanted in (with_weight, with_bias)]
    cpp.layer_norm_backward(
        address(dy), dy_stride, address(dh), dh_stride, address(matrix), stride, DTYPE_CODE[h.dtype],
        address(grad_x), address(weight), 0 if rms else address(mean), address(rstd),
        address(sums[0]) if with_weight else 0, address(sums[1]) if with_bias else 0, *matrix.shape,
        _casting_of(h, casting)
    )  # fmt: skip
    return grad_x, *sums
