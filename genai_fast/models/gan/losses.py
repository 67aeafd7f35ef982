"""What discriminator and generator minimise, given D's outputs at real and generated images."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Loss(NamedTuple):
    discriminator: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # at real, at generated, target of real
    generator: Callable[[torch.Tensor], torch.Tensor]  # at generated
    middle: float  # outputs above count as real


def _cross_entropy(logits: torch.Tensor, target: float) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _half_square(outputs: torch.Tensor, target: float) -> torch.Tensor:
    return 0.5 * (outputs - target).square().mean()


def loss_of(owner: str, name: str) -> Loss:
    """One of LOSSES. Raises ValueError on another name."""
    if name not in LOSSES:
        raise ValueError(f"{owner}: loss: expected one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name]


LOSSES = {
    # -log D(x) - log(1 - D(G(z))) and -log D(G(z)), D = sigmoid(logits): Goodfellow et al. 2014, arXiv:1406.2661
    "cross-entropy": Loss(
        lambda real, fake, target: _cross_entropy(real, target) + _cross_entropy(fake, 0.0),
        lambda fake: _cross_entropy(fake, 1.0),
        0.0,
    ),
    # max(0, 1 - D(x)) + max(0, 1 + D(G(z))) and -D(G(z)): Lim & Ye 2017, arXiv:1705.02894
    "hinge": Loss(
        lambda real, fake, target: F.relu(1 - real).mean() + F.relu(1 + fake).mean(), lambda fake: -fake.mean(), 0.0
    ),
    # ((D(x) - 1)^2 + D(G(z))^2) / 2 and (D(G(z)) - 1)^2 / 2: Mao et al. 2017, arXiv:1611.04076
    "least-squares": Loss(
        lambda real, fake, target: _half_square(real, target) + _half_square(fake, 0.0),
        lambda fake: _half_square(fake, 1.0),
        0.5,
    ),
}
