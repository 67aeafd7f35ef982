"""reparameterize on the CPU: allocates the results and calls cpu_kernel.cpp."""

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
        address(m), m_stride, address(v), v_stride, address(z), address(kl) if with_kl else 0,
        address(seed), offset, mu.shape[0], columns_of(mu), DTYPE_CODE[mu.dtype]
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
        0 if z is None else address(z), z_stride, kl_address, kl_stride,
        address(m), m_stride, address(v), v_stride,
        address(grad_mu), address(grad_logvar), address(seed), offset, mu.shape[0], columns_of(mu),
        DTYPE_CODE[mu.dtype]
    )  # fmt: skip
    return grad_mu, grad_logvar
