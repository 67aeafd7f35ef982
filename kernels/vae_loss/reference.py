"""vae_loss in plain PyTorch: the definition, the fallback and the eager peer of the numerics gate."""

import math

import torch
import torch.nn.functional as F


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _per_sample(x: torch.Tensor) -> torch.Tensor:
    """[B, ...] -> [B]: the sum over all but the first dimension, for empty shapes too."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).sum(1)


def _like(per_sample: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, ...], to broadcast against x."""
    return per_sample.view(-1, *[1] * (x.dim() - 1))


def vae_loss(recon, target, mu, logvar, beta_tensor, beta, likelihood, reduction):
    """loss = -log p(target | recon) + beta KL(N(mu, exp(logvar)) || N(0, I)), each summed over all but the batch."""
    x, t, m, v = _wide(recon), _wide(target), _wide(mu), _wide(logvar)
    if likelihood == "bernoulli":
        reconstruction = _per_sample(F.binary_cross_entropy_with_logits(x, t, reduction="none"))
    else:
        reconstruction = _per_sample((x - t) ** 2)
    kl = -0.5 * _per_sample(1.0 + v - m * m - torch.exp(v))
    loss = reconstruction + (beta if beta_tensor is None else beta_tensor) * kl
    if reduction == "none":
        return loss, reconstruction, kl
    reduce = torch.mean if reduction == "mean" else torch.sum
    return reduce(loss), reduce(reconstruction), reduce(kl)


def weights(grads, batch, beta_tensor, beta, reduction):
    """Per-sample weights [B] of the reconstruction and KL terms, from the gradients of the three outputs."""
    grad_loss, grad_reconstruction, grad_kl = (0.0 if g is None else g for g in grads)
    scale = 1.0 / max(batch, 1) if reduction == "mean" else 1.0
    of_reconstruction = scale * (grad_loss + grad_reconstruction)
    of_kl = scale * ((beta if beta_tensor is None else beta_tensor) * grad_loss + grad_kl)
    return of_reconstruction, of_kl


def vae_loss_backward(
    grad_loss, grad_reconstruction, grad_kl, recon, target, mu, logvar, beta_tensor, beta, likelihood, reduction
):
    """drecon = w (sigmoid(recon) - target) or 2 w (recon - target);  dmu = u mu;  dlogvar = u (exp(logvar) - 1) / 2."""
    batch = recon.shape[0]
    w, u = weights((grad_loss, grad_reconstruction, grad_kl), batch, beta_tensor, beta, reduction)
    w, u = (torch.as_tensor(g, dtype=_wide(recon).dtype, device=recon.device).expand(batch) for g in (w, u))
    x, t, m, v = _wide(recon), _wide(target), _wide(mu), _wide(logvar)
    residual = torch.sigmoid(x) - t if likelihood == "bernoulli" else 2.0 * (x - t)
    return (
        (_like(w, x) * residual).contiguous().to(recon.dtype),
        (_like(u, m) * m).contiguous().to(mu.dtype),
        (_like(u, v) * 0.5 * (torch.exp(v) - 1.0)).contiguous().to(logvar.dtype),
    )


def target_gradient(w, recon, target, likelihood):
    """dtarget = -w recon (Bernoulli) or -2 w (recon - target) (Gaussian), from the weights [B] or 0-d."""
    x, t = _wide(recon), _wide(target)
    slope = -x if likelihood == "bernoulli" else -2.0 * (x - t)
    return (_like(torch.as_tensor(w).expand(recon.shape[0]), x) * slope).to(target.dtype)
