"""reparameterize in plain PyTorch: the definition, the fallback and the eager peer of the numerics gate."""

import math

import torch

from genai_fast.kernels.common import philox


def _per_sample(x: torch.Tensor) -> torch.Tensor:
    """[B, ...] -> [B]: the sum over all but the first dimension, for empty shapes too."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).sum(1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _noise(like: torch.Tensor, seed: torch.Tensor, offset: int) -> torch.Tensor:
    return philox.normals(like.numel(), seed, offset).view(like.shape).to(like.dtype)


def reparameterize(mu, logvar, seed, offset, with_kl):
    """z = mu + exp(logvar / 2) * eps, and KL(N(mu, exp(logvar)) || N(0, I)) summed over all but the batch."""
    z = (mu + torch.exp(0.5 * logvar) * _noise(mu, seed, offset)).contiguous()
    if not with_kl:
        return z, _wide(mu).new_empty(0)
    m, v = _wide(mu), _wide(logvar)
    return z, -0.5 * _per_sample(1.0 + v - m * m - torch.exp(v))


def reparameterize_backward(grad_z, grad_kl, mu, logvar, seed, offset):
    """dmu = dz + mu dkl;  dlogvar = (dz exp(logvar / 2) eps + dkl (exp(logvar) - 1)) / 2."""
    grad_mu = grad_logvar = torch.zeros_like(mu, memory_format=torch.contiguous_format)
    if grad_z is not None:
        grad_mu = grad_mu + grad_z
        grad_logvar = grad_logvar + 0.5 * grad_z * torch.exp(0.5 * logvar) * _noise(mu, seed, offset)
    if grad_kl is not None:
        g = grad_kl.view(-1, *[1] * (mu.dim() - 1)).to(mu.dtype)
        grad_mu = grad_mu + g * mu
        grad_logvar = grad_logvar + 0.5 * g * (torch.exp(logvar) - 1.0)
    return grad_mu.to(mu.dtype), grad_logvar.to(logvar.dtype)
