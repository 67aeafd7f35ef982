"""Mu-law: samples in few levels, finer near 0."""

import math

import torch


def mu_law_encode(x: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """Samples in [-1, 1] -> the nearest of `levels` levels, int64 in [0, levels), in the shape of x.

    Level (1 + f(x)) m / 2, rounded, where f(x) = sign(x) log(1 + m |x|) / log(1 + m) and m = levels - 1. Samples beyond
    [-1, 1] get the first or last level.

    Raises ValueError: x is no floating-point tensor, or there are fewer than 2 levels.
    Source: ITU-T G.711 (m = 255); van den Oord et al. 2016 (WaveNet), arXiv:1609.03499.
    """
    most = _most("mu_law_encode", levels)
    if not x.is_floating_point():
        raise ValueError(f"mu_law_encode: x: expected floats in [-1, 1], got {x.dtype}; convert and scale them")
    x = x.clamp(-1, 1).to(torch.promote_types(x.dtype, torch.float32))
    compressed = x.sign() * torch.log1p(most * x.abs()) / math.log1p(most)
    return ((compressed + 1) * (most / 2)).round().long()


def mu_law_decode(codes: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """Levels of `mu_law_encode` -> samples in [-1, 1], float32, in the shape of `codes`.

    Raises ValueError: codes are no integers, or there are fewer than 2 levels.
    """
    most = _most("mu_law_decode", levels)
    if codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"mu_law_decode: codes: expected integers from 0 to {most}, got {codes.dtype}")
    compressed = codes.double() * (2 / most) - 1
    return (compressed.sign() * torch.expm1(compressed.abs() * math.log1p(most)) / most).float()


def _most(owner: str, levels: int) -> int:
    if levels < 2:
        raise ValueError(f"{owner}: levels: expected at least 2, got {levels}")
    return levels - 1
