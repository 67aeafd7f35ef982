"""vae_loss on the CPU: allocates the results and calls cpu_kernel.cpp."""

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
)

_REDUCTION_CODE = {"none": 0, "sum": 1, "mean": 2}


def _inputs(recon, target, mu, logvar):
    """The tensors that must stay alive during the call, and the arguments that describe them."""
    x, x_stride = as_rows(recon)
    t, t_stride = as_rows(target)
    m, m_stride = as_rows(mu)
    v, v_stride = as_rows(logvar)
    return (x, t, m, v), (
        address(x), x_stride, DTYPE_CODE[recon.dtype], address(t), t_stride, DTYPE_CODE[target.dtype],
        address(m), m_stride, address(v), v_stride, DTYPE_CODE[mu.dtype],
    )  # fmt: skip


def _settings(recon, mu, beta_tensor, beta, likelihood, reduction):
    return (
        beta if beta_tensor is None else float(beta_tensor), recon.size(0), columns_of(recon), columns_of(mu),
        likelihood == "bernoulli", _REDUCTION_CODE[reduction]
    )  # fmt: skip


def vae_loss(recon, target, mu, logvar, beta_tensor, beta, likelihood, reduction):
    require_alike(recon, target, dtype=False)
    require_alike(mu, logvar)
    require_per_sample(recon, mu)
    _alive, inputs = _inputs(recon, target, mu, logvar)
    shape = (recon.size(0),) if reduction == "none" else ()
    loss = recon.new_empty(shape, dtype=torch.float32)
    reconstruction, kl = torch.empty_like(loss), torch.empty_like(loss)
    cpp.vae_loss(
        *inputs,
        address(loss),
        address(reconstruction),
        address(kl),
        *_settings(recon, mu, beta_tensor, beta, likelihood, reduction),
    )
    return loss, reconstruction, kl


def vae_loss_backward(
    grad_loss, grad_reconstruction, grad_kl, recon, target, mu, logvar, beta_tensor, beta, likelihood, reduction
):
    require_alike(recon, target, dtype=False)
    require_alike(mu, logvar)
    require_per_sample(recon, mu)
    require_per_sample(recon, grad_loss, grad_reconstruction, grad_kl, one=reduction != "none")
    _alive, inputs = _inputs(recon, target, mu, logvar)
    loss, loss_address, loss_stride = per_sample_gradient(grad_loss)
    image, image_address, image_stride = per_sample_gradient(grad_reconstruction)
    latent, latent_address, latent_stride = per_sample_gradient(grad_kl)
    _alive += (loss, image, latent)
    grad_recon, grad_mu, grad_logvar = dense_like(recon), dense_like(mu), dense_like(logvar)
    cpp.vae_loss_backward(
        loss_address, loss_stride, image_address, image_stride, latent_address, latent_stride, *inputs,
        address(grad_recon), address(grad_mu), address(grad_logvar),
        *_settings(recon, mu, beta_tensor, beta, likelihood, reduction),
    )  # fmt: skip
    return grad_recon, grad_mu, grad_logvar
