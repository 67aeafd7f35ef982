"""Distances between two sets of features, and numbers that say how varied a set is."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

_CHUNK = 1 << 20  # distances held at once: 8 MiB of float64
_MOST = 500  # samples that the diversity is of: its time grows with their cube
_BANDWIDTH = 0.25  # of its kernel, in median distances of the data


class PRDC(NamedTuple):
    precision: float  # share of generated samples that lie where data lies, in [0, 1]
    recall: float  # share of the data that lies where generated samples lie, in [0, 1]
    density: float  # precision that outliers among the data do not inflate: >= 0, about 1 for equal distributions
    coverage: float  # share of the data with a generated sample in its neighbourhood, in [0, 1]


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2): two feature sets as Gaussians.

    The squared 2-Wasserstein distance between Gaussians with the sets' means and covariances S (divided by N - 1). It
    grows as either set shrinks, by noise in S alone (Chong & Forsyth 2020, arXiv:1911.07023), and has the features'
    squared unit: compare only values of equal features and equal counts.

    Args:
        a, b: features [N, D] and [M, D], N and M >= 2, any floating dtype; D may exceed N. Computed in
            float64 on the CPU.

    Returns: The distance, >= 0; a set to itself gives 0 up to float64's rounding.
    Raises ValueError: other shapes, fewer than 2 rows, or a value that is infinite or NaN. TypeError: other dtypes.
    Source: Dowson & Landau 1982, J. Multivariate Analysis 12(3); for features: Heusel et al. 2017, arXiv:1706.08500.
    """
    a, b = _features("frechet_distance", a=a, b=b, least=2)
    (mean_a, root_a), (mean_b, root_b) = _gaussian(a), _gaussian(b)
    # With S = R'R and the polar decomposition R = U S^1/2, the singular values of R_a R_b' are those of
    # S_a^1/2 S_b^1/2, so their sum is the trace sought. No eigenvalue is squared and rooted again: rank-deficient
    # covariances lose no digits and give no NaN.
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2.0 * overlap
    return max(float(distance), 0.0)


def _gaussian(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] of the rows, and R [min(N, D), D] with R'R their covariance."""
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R


def precision_recall_density_coverage(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> PRDC:
    """How much of `fake` lies within the data, and how much of the data `fake` reaches, by k nearest neighbours.

    With B(x) the closed ball around x that reaches the k-th nearest other sample of x's own set:
    precision: share of fake samples in some B(real); recall: share of real ones in some B(fake);
    density: mean number of balls B(real) that a fake sample lies in, over k;
    coverage: share of real samples whose B(real) holds a fake sample.
    Time is O((N + M)^2 D); distances are held a million at a time.

    Args:
        real, fake: features [N, D] and [M, D], any floating dtype, N and M > k; M about N makes values comparable.
            Computed in float64, on CUDA if `real` is there and on the CPU otherwise.
        k: neighbours, >= 1.

    Raises ValueError: other shapes, too few rows for k, or a value that is infinite or NaN. TypeError: other dtypes.
    Source: precision and recall: Kynkäänniemi et al. 2019, arXiv:1904.06991; density and coverage: Naeem et al. 2020,
        arXiv:2002.09797.
    """
    name = "precision_recall_density_coverage"
    if k < 1:
        raise ValueError(f"{name}: k: expected at least 1, got {k}; remedy: k=5")
    device = real.device if real.is_cuda else "cpu"  # others may have no float64
    real, fake = _features(name, real=real, fake=fake, least=k + 1, device=device)
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)
    within = torch.zeros(len(fake), dtype=torch.int64, device=real.device)  # balls B(real) that each fake lies in
    recalled = covered = 0
    for first, distance in _distances(real, fake):  # [rows, M]
        radius = real_radius[first : first + len(distance), None]
        inside = distance <= radius
        within += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((distance <= fake_radius).any(1).sum())
    precision, density = float((within > 0).double().mean()), float(within.double().mean()) / k
    return PRDC(precision, recalled / len(real), density, covered / len(real))


def _distances(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Euclidean distances [rows, M] of a few rows of a at a time, each after the number of its first row."""
    rows = max(1, _CHUNK // len(b))
    for first in range(0, len(a), rows):
        # By differences: a matrix product would round equal samples apart, and otherwise for each chunk size.
        yield first, torch.cdist(a[first : first + rows], b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """Distance [N] of each row to its k-th nearest other row."""
    # The row itself, at distance 0, is the first of k + 1.
    return torch.cat([distance.kthvalue(k + 1, dim=1).values for _, distance in _distances(x, x)])


def sample_diversity(fake: torch.Tensor, real: torch.Tensor) -> float:
    """Effective number of distinct samples in `fake`, over that in the data: 1 as diverse as data, 0 all alike.

    The effective number of n samples is the Vendi score exp(-sum l ln l), l the eigenvalues of K / n, with the kernel
    K = exp(-d^2 / (2 h^2)) and h a quarter of the data's median distance: n copies of one sample count as 1, n samples
    far from each other as n. A mean of distances would not do: ten samples again and again have 9/10 of the distance of
    ever new ones. Blurred or pale samples count as less diverse too, since their features differ less.
    Of each set the first min(N, M, 500) samples count; independent draws of the data give 1 within about 0.1 for
    hundreds of samples.

    Args:
        fake, real: features [N, D] and [M, D], N and M >= 2, any floating dtype. Computed in float64 on the CPU.

    Raises:
        ValueError: other shapes, fewer than 2 rows, infinity or NaN, or data whose median distance is 0.
        TypeError: other dtypes.
    Source: Friedman & Dieng 2023, arXiv:2210.02410.
    """
    fake, real = _features("sample_diversity", fake=fake, real=real, least=2)
    count = min(len(fake), len(real), _MOST)
    fake, real = fake[:count], real[:count]
    unit = float(torch.pdist(real).median())
    if unit == 0.0:
        raise ValueError("sample_diversity: real: expected samples that differ, got equal ones; remedy: other data")
    return _effective_number(fake, _BANDWIDTH * unit) / _effective_number(real, _BANDWIDTH * unit)


def _effective_number(x: torch.Tensor, bandwidth: float) -> float:
    """The Vendi score of features [N, D], in [1, N]."""
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    kernel = torch.exp(-0.5 * (distance / bandwidth).square())
    shares = torch.linalg.eigvalsh(kernel / len(x)).clamp(min=0.0)
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def active_units(mu: torch.Tensor, threshold: float = 0.01) -> int:
    """How many latent units say something about the data: those with Var_x(E[z | x]) > threshold.

    Args:
        mu: posterior means [N, latent] of N >= 2 samples of the data, any floating dtype.
        threshold: least variance, in squared units of the prior's standard deviation.

    Raises ValueError: another shape, fewer than 2 rows, or a value that is infinite or NaN. TypeError: another dtype.
    Source: Burda, Grosse & Salakhutdinov 2015, arXiv:1509.00519.
    """
    (mu,) = _features("active_units", mu=mu, least=2)
    return int((mu.var(0) > threshold).sum())


def _features(
    function: str, *, least: int, device: torch.device | str = "cpu", **sets: torch.Tensor
) -> list[torch.Tensor]:
    """The sets in float64 on the device, after checks that name function, argument, expected and got."""
    width = None
    for name, x in sets.items():
        if not x.is_floating_point():
            raise TypeError(f"{function}: {name}: expected a floating dtype, got {x.dtype}; remedy: {name}.float()")
        if x.dim() != 2:
            raise ValueError(f"{function}: {name}: expected [N, D], got {list(x.shape)}; remedy: {name}.flatten(1)")
        if len(x) < least:
            raise ValueError(f"{function}: {name}: expected at least {least} rows, got {len(x)}; remedy: more samples")
        width = width or x.shape[1]
        if x.shape[1] != width:
            raise ValueError(
                f"{function}: {name}: expected {width} features a row, got {x.shape[1]}; remedy: one extractor for both"
            )
        bad = int((~torch.isfinite(x)).any(1).sum())
        if bad:
            raise ValueError(
                f"{function}: {name}: expected finite values, got {bad} of {len(x)} rows with infinity or NaN;"
                f" remedy: find what diverged before measuring it"
            )
    return [x.detach().to(device, torch.float64) for x in sets.values()]
