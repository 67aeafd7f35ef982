"""Reparameterized sampling of a diagonal Gaussian, with its KL divergence in the same pass."""

import torch

from genai_fast.backends import forced_backend
from genai_fast.ops import checks, rows
from genai_fast.ops.dispatch import KernelFunction, backward_call, library_call
from genai_fast.ops.planned import planned


class _Reparameterize(KernelFunction):
    @staticmethod
    def forward(mu, logvar, seed, offset, with_kl, backend):
        return library_call("reparameterize", mu, logvar, seed, offset, with_kl, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        mu, logvar, seed, ctx.offset, ctx.with_kl, ctx.backend = inputs
        ctx.save_for_backward(mu, logvar, seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_z, grad_kl):
        if not ctx.with_kl:
            grad_kl = None  # torch.compile hands over an empty tensor
        if grad_z is None and grad_kl is None:
            return {}
        arguments = (grad_z, grad_kl, *ctx.saved_tensors, ctx.offset, ctx.backend)
        grad_mu, grad_logvar = backward_call("reparameterize_backward", *arguments)
        return dict(mu=grad_mu, logvar=grad_logvar)


def _call(op, mu, logvar, seed, offset, with_kl):
    checks.is_floating(op, "mu", mu)
    checks.has_batch(op, "mu", mu)
    checks.matches(op, "logvar", logvar, "mu", mu)
    offset = checks.offset(op, offset)
    if seed is None and not offset:
        offset = rows.offset(mu.numel())
    seed = checks.seed(op, seed, "mu", mu)
    if mu.dtype is not logvar.dtype:  # under autocast only
        dtype = torch.promote_types(mu.dtype, logvar.dtype)
        mu, logvar = mu.to(dtype), logvar.to(dtype)
    return _Reparameterize.call(mu, logvar, seed, offset, with_kl, forced_backend())


@planned
def reparameterize(
    mu: torch.Tensor, logvar: torch.Tensor, *, seed: int | torch.Tensor | None = None, offset: int = 0
) -> torch.Tensor:
    """z = mu + exp(logvar / 2) * eps with eps ~ N(0, I); eps is recomputed in backward, never stored.

    Args:
        mu: mean, [B, ...], float32, bfloat16, float16 or float64, any strides.
        logvar: log-variance, shape, dtype and device of mu (under autocast dtypes may differ: the wider one wins).
        seed: an int or a 0-d int64 tensor on mu's device, or None to draw one from that device's default generator
            (so that torch.manual_seed makes it reproducible, and each replay of a CUDA graph draws again).
        offset: elements of the global tensor that come before this one, so that data-parallel ranks that share
            a seed draw the noise of their own rows: element i uses position offset + i of the seed's stream.
            Without it and a seed: what `ops.rows` says.

    Returns: z, shape and dtype of mu (the wider one's under autocast), contiguous.
    Gradients: mu and logvar, to any order (the second and higher through plain PyTorch; torch.compile refuses those).
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64). Other strides than row-major rows are
        copied first.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Kingma & Welling 2013, arXiv:1312.6114; Philox: Salmon et al. 2011.
    """
    return _call("reparameterize", mu, logvar, seed, offset, False)[0]


@planned
def reparameterize_kl(
    mu: torch.Tensor, logvar: torch.Tensor, *, seed: int | torch.Tensor | None = None, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """z as `reparameterize` gives it, and KL(N(mu, exp(logvar)) || N(0, I)), in one pass.

    kl[b] = -0.5 * sum(1 + logvar[b] - mu[b]^2 - exp(logvar[b])).

    Args:
        mu, logvar, seed, offset: as for `reparameterize`.

    Returns: z, shape and dtype of mu, contiguous; kl, [B] in nats, float32 (float64 if mu is).
    Gradients: mu and logvar through both results, to any order (the second and higher through plain PyTorch;
        torch.compile refuses those).
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64).
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Kingma & Welling 2013, arXiv:1312.6114.
    """
    return _call("reparameterize_kl", mu, logvar, seed, offset, True)
