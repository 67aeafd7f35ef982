"""vae_loss on the CPU: allocates the results and calls cpu_kernel.cpp."""

from __future__ import annotations

import torch

from genai_fast.kernels.common.extension import cpu_kernels
from genai_fast.kernels.common.rows import DTYPE_CODE, as_rows, columns_of, dense_like, per_sample_gradient

_REDUCTION_CODE = {"none": 0, "sum": 1, "mean": 2}


def _inputs(recon, target, mu, logvar):
    """The tensors that must stay alive during the call, and the arguments that describe them."""
    (x, x_stride), (t, t_stride), (m, m_stride), (v, v_stride) = map(as_rows, (recon, target, mu, logvar))
    return (x, t, m, v), (
        x.data_ptr(), x_stride, DTYPE_CODE[recon.dtype], t.data_ptr(), t_stride, DTYPE_CODE[target.dtype],
        m.data_ptr(), m_stride, v.data_ptr(), v_stride, DTYPE_CODE[mu.dtype],
    )  # fmt: skip


def _settings(recon, mu, beta_tensor, beta, likelihood, reduction):
    return (
        beta if beta_tensor is None else float(beta_tensor), recon.shape[0], columns_of(recon), columns_of(mu),
        likelihood == "bernoulli", _REDUCTION_CODE[reduction], torch.get_num_threads(),
    )  # fmt: skip


def vae_loss(recon, target, mu, logvar, beta_tensor, beta, likelihood, reduction):
    alive, inputs = _inputs(recon, target, mu, logvar)
    shape = recon.shape[:1] if reduction == "none" else ()
    outputs = tuple(recon.new_empty(shape, dtype=torch.float32) for _ in range(3))
    cpu_kernels()[0]["vae_loss"](
        *inputs, *(x.data_ptr() for x in outputs),
        *_settings(recon, mu, beta_tensor, beta, likelihood, reduction),
    )  # fmt: skip
    del alive
    return outputs


def vae_loss_backward(
    grad_loss, grad_reconstruction, grad_kl, recon, target, mu, logvar, beta_tensor, beta, likelihood, reduction
):
    upstream = [per_sample_gradient(g) for g in (grad_loss, grad_reconstruction, grad_kl)]
    alive, inputs = _inputs(recon, target, mu, logvar)
    grads = tuple(dense_like(x) for x in (recon, mu, logvar))
    cpu_kernels()[0]["vae_loss_backward"](
        *(value for g in upstream for value in g[1:]), *inputs, *(g.data_ptr() for g in grads),
        *_settings(recon, mu, beta_tensor, beta, likelihood, reduction),
    )  # fmt: skip
    del alive
    return grads
