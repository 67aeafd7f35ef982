"""The negative evidence lower bound of a VAE: reconstruction and KL terms, and their gradients, in one pass each."""

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from genai_fast.backends import forced_backend
from genai_fast.kernels.vae_loss import reference
from genai_fast.ops import checks
from genai_fast.ops.dispatch import KernelFunction, backward_call, library_call, transformed
from genai_fast.ops.planned import planned
from genai_fast.precision import without_autocast

_OP = "vae_loss"


class VAELoss(NamedTuple):
    loss: torch.Tensor
    reconstruction: torch.Tensor
    kl: torch.Tensor


class _VAELoss(KernelFunction):
    @staticmethod
    def forward(recon, target, mu, logvar, beta_tensor, beta, likelihood, reduction, backend):
        return library_call("vae_loss", recon, target, mu, logvar, beta_tensor, beta, likelihood, reduction, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        recon, target, mu, logvar, beta_tensor, *ctx.settings, ctx.backend = inputs
        ctx.save_for_backward(recon, target, mu, logvar, beta_tensor)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        if all(g is None for g in grads):
            return {}
        recon, target, mu, logvar, beta_tensor = ctx.saved_tensors
        beta, likelihood, reduction = ctx.settings
        arguments = (*grads, recon, target, mu, logvar, beta_tensor, beta, likelihood, reduction, ctx.backend)
        grad_recon, grad_mu, grad_logvar = backward_call("vae_loss_backward", *arguments)
        # Rarely asked for, so plain PyTorch serves.
        grad_target = grad_beta = None
        if ctx.needs_input_grad[1]:
            w, _ = reference.weights(grads, recon.shape[0], beta_tensor, beta, reduction)
            grad_target = reference.target_gradient(w, recon, target, likelihood)
        if ctx.needs_input_grad[4] and grads[0] is not None:
            kl = reference.vae_loss(recon, target, mu, logvar, None, 0.0, likelihood, reduction)[2]
            grad_beta = (grads[0] * kl).sum().to(beta_tensor.dtype)
        return dict(recon=grad_recon, target=grad_target, mu=grad_mu, logvar=grad_logvar, beta_tensor=grad_beta)


def vae_loss(
    recon: torch.Tensor,
    target: torch.Tensor,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    *,
    likelihood: str = "bernoulli",
    beta: float | torch.Tensor = 1.0,
    reduction: str = "mean",
    from_logits: bool = True,
) -> VAELoss:
    """loss = -log p(target | recon) + beta * KL(N(mu, exp(logvar)) || N(0, I)), summed over all but the batch.

    Bernoulli: -log p = sum of BCE(sigmoid(recon), target). The loss takes logits: drop the decoder's sigmoid and apply
    it only for display; or, with from_logits=False, keep it: -log p = sum of F.binary_cross_entropy(recon, target).
    Gaussian: sum of (recon - target)^2, the squared error that `F.mse_loss(reduction="sum")` gives (-log p up to a
    constant at variance 1/2).

    Args:
        recon: decoder output, [B, ...], float32, bfloat16, float16 or float64, any strides.
        target: data, shape, dtype and device of recon (under autocast dtypes may differ); in [0, 1] for Bernoulli
            (not checked: that would read it once more).
        mu, logvar: posterior mean and log-variance, [B, ...] each.
        likelihood: "bernoulli" or "gaussian".
        beta: weight of the KL term, >= 0: a float, or a 0-d tensor that a schedule may change, in a CUDA graph too.
        reduction: "mean" or "sum" over the batch, or "none" for one value per sample.
        from_logits: whether a Bernoulli's recon is logits, not probabilities in [0, 1]. Logits are faster and exact
            where the sigmoid saturates. (The output of a sigmoid that is given as logits is warned of.)

    Returns: VAELoss(loss, reconstruction, kl) in nats, float32 (float64 if recon is): 0-d, or [B] for "none".
    Gradients: recon, target, mu, logvar and a beta tensor, to any order (the second and higher through plain
        PyTorch, as target's and beta's first; torch.compile refuses those).
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64).
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Kingma & Welling 2013, arXiv:1312.6114; beta: Higgins et al. 2017.
    """
    losses = _vae_loss(recon, target, mu, logvar, likelihood, beta, reduction, from_logits)
    if likelihood == "bernoulli" and from_logits and not transformed() and _is_sigmoid(recon.grad_fn):
        warnings.warn(
            f"{_OP}: recon: expected logits, got the output of a sigmoid; leave the sigmoid out, or pass"
            f" from_logits=False",
            UserWarning,
            stacklevel=2,
        )
    return losses


@planned
def _vae_loss(recon, target, mu, logvar, likelihood, beta, reduction, from_logits):
    """The op without a look at what made recon."""
    checks.is_floating(_OP, "recon", recon)
    checks.has_batch(_OP, "recon", recon)
    checks.matches(_OP, "target", target, "recon", recon)
    checks.is_floating(_OP, "mu", mu)
    checks.has_batch(_OP, "mu", mu)
    checks.same_device(_OP, "mu", mu, "recon", recon)
    if mu.shape[0] != recon.shape[0]:
        raise ValueError(f"{_OP}: mu: batch expected {recon.shape[0]} as recon has, got {mu.shape[0]}")
    checks.matches(_OP, "logvar", logvar, "mu", mu)
    checks.one_of(_OP, "likelihood", likelihood, ("bernoulli", "gaussian"))
    checks.one_of(_OP, "reduction", reduction, ("mean", "sum", "none"))
    if mu.dtype is not logvar.dtype:  # under autocast only
        dtype = torch.promote_types(mu.dtype, logvar.dtype)
        mu, logvar = mu.to(dtype), logvar.to(dtype)
    settings = (*checks.scalar(_OP, "beta", beta, recon), likelihood, reduction, forced_backend())
    if likelihood == "bernoulli" and not checks.flag(_OP, "from_logits", from_logits):
        # The kernel gives the KL term, beside a reconstruction of nothing.
        nothing = recon.new_empty((recon.size(0), 0))
        weighted, _, kl = _VAELoss.call(nothing, nothing, mu, logvar, *settings)
        reconstruction = _of_probabilities(recon, target, reduction)
        return VAELoss(reconstruction + weighted, reconstruction, kl)
    return VAELoss(*_VAELoss.call(recon, target, mu, logvar, *settings))


def _of_probabilities(recon: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
    """Binary cross-entropy of probabilities, in float32 at least; also under autocast, which refuses it."""
    dtype = torch.promote_types(recon.dtype, torch.float32)
    with without_autocast(recon.device.type):
        losses = F.binary_cross_entropy(recon.to(dtype), target.to(dtype), reduction="none").flatten(1).sum(1)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Transpose", "Permute", "Alias", "Clone", "T")


def _is_sigmoid(made_by: Any) -> bool:
    """Whether that node of autograd's graph, or the one below its views, is a sigmoid, PyTorch's or one of our ops'."""
    while made_by is not None and type(made_by).__name__.startswith(tuple(f"{name}Backward" for name in _VIEWS)):
        made_by = made_by.next_functions[0][0]
    ours = (*getattr(made_by, "settings", ()), *getattr(made_by, "activation", ()))
    return type(made_by).__name__ == "SigmoidBackward0" or "sigmoid" in ours
