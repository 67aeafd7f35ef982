"""Differentiable augmentation: random changes of real and generated images on their way to the discriminator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from genai_fast.ops import rows

_SHIFT, _CUT = 0.125, 0.5  # of a side: the largest shift, and the side of what is cut out


def diff_augment(x: torch.Tensor, policy: tuple[str, ...]) -> torch.Tensor:
    """Images [B, C, H, W] in [-1, 1] -> changed ones, each differently; differentiable any number of times.

    color: brightness + U(-0.5, 0.5), saturation times U(0, 2), contrast times U(0.5, 1.5). translation: by up to an
    eighth of the sides, zeros where nothing is. cutout: a rectangle of half the sides, centred anywhere, is 0.

    Args:
        policy: some of POLICIES, applied in this order.

    Source: Zhao et al. 2020, arXiv:2006.10738.
    """
    for name in policy:
        x = POLICIES[name](x)
    return x


def _uniform(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """A number for each image, [B, 1, 1, 1]."""
    return low + (high - low) * rows.drawn(lambda n: torch.rand(n, 1, 1, 1, device=x.device), len(x))


def _integers(x: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """One from low to high for each image, [B, 1]."""
    return rows.drawn(lambda n: torch.randint(low, high + 1, (n, 1), device=x.device), len(x))


def _color(x: torch.Tensor) -> torch.Tensor:
    x = x + _uniform(x, -0.5, 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * _uniform(x, 0, 2) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * _uniform(x, 0.5, 1.5) + mean


def _translation(x: torch.Tensor) -> torch.Tensor:
    for side in (2, 3):
        size = x.size(side)
        most = int(size * _SHIFT + 0.5)
        source = torch.arange(size, device=x.device) - _integers(x, -most, most)  # [B, size]
        shape = (len(x), 1, size, 1) if side == 2 else (len(x), 1, 1, size)
        inside = ((source >= 0) & (source < size)).view(shape)
        x = x.gather(side, source.clamp(0, size - 1).view(shape).expand_as(x)) * inside
    return x


def _cutout(x: torch.Tensor) -> torch.Tensor:
    inside = []
    for side in (2, 3):
        size, cut = x.size(side), int(x.size(side) * _CUT + 0.5)
        first = _integers(x, 0, size - 1 + cut % 2) - cut // 2
        place = torch.arange(size, device=x.device)
        inside.append((place >= first) & (place < first + cut))  # [B, size]
    return x * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


POLICIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}


def policy_of(owner: str, text: str) -> tuple[str, ...]:
    """Names of POLICIES, from such as "color,cutout". Raises ValueError on others."""
    names = tuple(part.strip() for part in text.split(",")) if text else ()
    if unknown := [name for name in names if name not in POLICIES]:
        raise ValueError(
            f"{owner}: diff_augment: expected some of {', '.join(POLICIES)}, separated by commas, got {unknown[0]!r}"
        )
    return names
