"""How near images are to those that they should be: PSNR and SSIM."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

_WINDOW, _SIGMA = 11, 1.5  # pixels of SSIM's Gaussian window, and its standard deviation
_K1, _K2 = 0.01, 0.03


def psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images [N, C, H, W] in [0, 1], all together; infinite if they are equal.

    -10 log10 of the mean squared error over all images and channels. The mean of each image's own ratio, which papers
    give of photographs, is decided by images with little in them, whose ratios are huge or infinite.

    Raises ValueError: shapes that differ, or no images.
    """
    _check("psnr", x, y)
    return float(-10.0 * (x.double() - y.double()).square().mean().log10())


def ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """Structural similarity, the mean over images [N, C, H, W] in [0, 1] and channels; 1 for equal ones.

    With the authors' Gaussian window of 11 x 11 pixels (smaller images: as large as they are), without borders.

    Raises ValueError: shapes that differ, or no images.
    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861.
    """
    _check("ssim", x, y)
    channels, side = x.shape[1], min(_WINDOW, *x.shape[2:])
    place = torch.arange(side, dtype=torch.float64, device=x.device) - (side - 1) / 2
    line = (-place.square() / (2 * _SIGMA**2)).exp()
    line = line / line.sum()

    def mean(image: torch.Tensor) -> torch.Tensor:
        rows = F.conv2d(image, line.view(1, 1, side, 1).expand(channels, -1, -1, -1), groups=channels)
        return F.conv2d(rows, line.view(1, 1, 1, side).expand(channels, -1, -1, -1), groups=channels)

    found = []
    for p, q in zip(x.double().split(100), y.double().split(100), strict=True):
        mp, mq = mean(p), mean(q)
        vp, vq, both = mean(p * p) - mp * mp, mean(q * q) - mq * mq, mean(p * q) - mp * mq
        light = (2 * mp * mq + _K1**2) / (mp * mp + mq * mq + _K1**2)
        found.append((light * (2 * both + _K2**2) / (vp + vq + _K2**2)).flatten(1).mean(1))
    return math.fsum(torch.cat(found).tolist()) / len(x)


def _check(op: str, x: torch.Tensor, y: torch.Tensor) -> None:
    if x.dim() != 4 or x.shape != y.shape or not x.numel():
        raise ValueError(f"{op}: y: expected images [N, C, H, W] as x has, {tuple(x.shape)}, got {tuple(y.shape)}")
