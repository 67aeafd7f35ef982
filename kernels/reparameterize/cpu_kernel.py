"""reparameterize on the CPU: allocates the results and calls cpu_kernel.cpp."""

from __future__ import annotations

import torch

from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import (
    DTYPE_CODE,
    address,
    as_rows,
    columns_of,
    dense_like,
    per_sample_gradient,
    require_alike,
    require_per_sample,
    require_seed,
)


def reparameterize(mu, logvar, seed, offset, with_kl):
    require_alike(mu, logvar)
    require_seed(seed, mu)
    m, m_stride = as_rows(mu)
    v, v_stride = as_rows(logvar)
    z = dense_like(mu)
    kl = mu.new_empty(mu.shape[0] if with_kl else 0, dtype=torch.float32)
    cpp.reparameterize(
        m.data_ptr(), m_stride, v.data_ptr(), v_stride, z.data_ptr(), kl.data_ptr() if with_kl else 0,
        seed.data_ptr(), offset, mu.shape[0], columns_of(mu), DTYPE_CODE[mu.dtype]
    )  # fmt: skip
    return z, kl


def reparameterize_backward(grad_z, grad_kl, mu, logvar, seed, offset):
    require_alike(mu, logvar, grad_z)
    require_seed(seed, mu)
    require_per_sample(mu, grad_kl)
    m, m_stride = as_rows(mu)
    v, v_stride = as_rows(logvar)
    z, z_stride = (None, 0) if grad_z is None else as_rows(grad_z)
    _alive, kl_address, kl_stride = per_sample_gradient(grad_kl)
    grad_mu, grad_logvar = dense_like(mu), dense_like(logvar)
    cpp.reparameterize_backward(
        0 if z is None else z.data_ptr(), z_stride, kl_address, kl_stride,
        m.data_ptr(), m_stride, v.data_ptr(), v_stride,
        grad_mu.data_ptr(), grad_logvar.data_ptr(), seed.data_ptr(), offset, mu.shape[0], columns_of(mu),
        DTYPE_CODE[mu.dtype]
    )  # fmt: skip
    return grad_mu, grad_logvar
