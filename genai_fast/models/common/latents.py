"""Paths between latents, and the latent of a damaged image."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.models.common import checks

_ERRORS = {"gaussian": F.mse_loss, "bernoulli": F.binary_cross_entropy_with_logits}


def slerp(a: torch.Tensor, b: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
    """Spherical interpolation: (sin((1 - t) w) a + sin(t w) b) / sin(w), w the angle between a and b.

    Between draws of N(0, I) it stays at their length, where a straight line passes closer to 0 than any draw. Parallel
    and opposite vectors, which no one great circle joins, are interpolated linearly.

    Args:
        a, b: [..., latent], float; shapes broadcast.
        t: 0 gives a, 1 gives b: a float, or a tensor that broadcasts against the leading dimensions. For a and b
            [latent], `torch.linspace(0, 1, n)` gives [n, latent].

    Returns: [..., latent], dtype of a and b (computed in float32 at least).
    Raises: ValueError where a and b differ in length or dtype.
    Source: Shoemake 1985, doi:10.1145/325165.325242; White 2016, arXiv:1609.04468.
    """
    if a.dtype is not b.dtype or a.shape[-1:] != b.shape[-1:] or not (a.dim() and a.is_floating_point()):
        raise ValueError(
            f"slerp: b: expected floats [..., latent] as a is, {a.dtype} {tuple(a.shape)}, got {b.dtype}"
            f" {tuple(b.shape)}; convert or reshape one"
        )
    wide = torch.promote_types(a.dtype, torch.float32)
    p, q = a.to(wide), b.to(wide)
    t = torch.as_tensor(t, dtype=wide, device=a.device).unsqueeze(-1)
    u, v = F.normalize(p, dim=-1), F.normalize(q, dim=-1)
    # Exact for small angles, where the arc cosine of u v is not (Kahan).
    angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
    sine = angle.sin()
    straight = sine < 1e-4
    sine = torch.where(straight, 1.0, sine)
    left = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    right = torch.where(straight, t, (t * angle).sin() / sine)
    return (left * p + right * q).to(a.dtype)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation, then each as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def normal(count: int, latent: int, seed: int | None) -> torch.Tensor:
    """N(0, I), [count, latent], drawn on the CPU: a seed gives the same everywhere and moves no other generator."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(count, latent, generator=generator, device="cpu")


def line(a: torch.Tensor, b: torch.Tensor, steps: int) -> torch.Tensor:
    """a and b [latent] -> [steps, latent], evenly from one to the other, both included."""
    checks.positive("interpolate", steps=steps)
    return torch.lerp(a, b, torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)[:, None])


def inpaint(
    encode: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    decode: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    mask: torch.Tensor,
    *,
    likelihood: str = "gaussian",
    steps: int = 200,
    lr: float = 0.05,
    seed: int | None = None,
) -> torch.Tensor:
    """Repair images: minimise -log p(known pixels of x | z) + |z|^2 / 2 over z by Adam; decode(z) where x is missing.

    It starts at q(z | x), x's missing pixels being the mean of the known ones by channel. Nothing but z is changed, and
    images do not depend on each other where encode and decode are in evaluation (see `evaluating`).

    Args:
        encode: images [B, C, H, W] -> mu, logvar of q(z | x), [B, latent].
        decode: z -> means (Gaussian) or logits (Bernoulli) of p(x | z), as many values an image as x has.
        x: [B, C, H, W]; values under the mask are not looked at.
        mask: [B, 1, H, W], bool, True where x is missing.
        likelihood: "gaussian" or "bernoulli", as for `ops.vae_loss`.
        steps: of Adam; 0 gives what the start decodes to.
        lr: learning rate of Adam.
        seed: None starts at q's mean; an int at a draw from q, so that seeds give different repairs.

    Returns: [B, C, H, W], x itself wherever mask is False; no gradient.
    Raises: ValueError on a mask that does not fit, negative steps, and another likelihood.
    """
    checks.mask("inpaint", x, mask)
    if steps < 0:
        raise ValueError(f"inpaint: steps: expected at least 0, got {steps}")
    if likelihood not in _ERRORS:
        raise ValueError(f"inpaint: likelihood: expected 'gaussian' or 'bernoulli', got {likelihood!r}")
    # Under inference_mode or no_grad the search still needs gradients, of tensors that it made itself.
    with torch.inference_mode(False), torch.enable_grad():
        known = ~mask.clone()
        x = torch.where(known, x.detach().clone(), 0.0)  # NaN under the mask must not spread
        mean = x.sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)
        with torch.no_grad():
            z, logvar = encode(torch.where(known, x, mean))
            if seed is not None:
                eps = normal(*z.shape, seed).to(z)
                z = z + eps * torch.exp(0.5 * logvar)
        z = z.detach().to(x.dtype, copy=True).requires_grad_()
        adam = torch.optim.Adam([z], lr=lr)
        for _ in range(steps):
            recon = decode(z).view(x.shape)
            energy = (_ERRORS[likelihood](recon, x, reduction="none") * known).sum() + 0.5 * z.square().sum()
            (z.grad,) = torch.autograd.grad(energy, z)  # of z alone: the weights' stay as they are
            adam.step()
        with torch.no_grad():
            recon = decode(z).view(x.shape)
            return torch.where(known, x, recon.sigmoid() if likelihood == "bernoulli" else recon)
