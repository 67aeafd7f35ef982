"""Figures of images that have something to be compared with: labels, or the images that they should be."""

import math

import pytest
import torch

from genai_fast.data import Images
from genai_fast.evaluation import Classifier, psnr, ssim


def test_a_classifier_knows_what_it_learned_and_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 3
    x = torch.rand(240, 1, 12, 12, generator=generator) * 0.5
    for k in range(3):
        x[labels == k, :, 4 * k : 4 * k + 4] += 0.5
    images = Images("bars", x, labels, ("top", "middle", "bottom"))
    state = torch.get_rng_state()
    with torch.no_grad():  # as figures are computed
        judge = Classifier(images.subset(torch.arange(200)), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert judge.accuracy(x[200:], labels[200:]) == 1.0 and judge.accuracy(x[200:], (labels[200:] + 1) % 3) == 0.0
    assert 0.1 < judge.accuracy(x[200:].flip(2), labels[200:]) < 0.6  # the middle alone
    with pytest.raises(ValueError, match="expected labels of at least two classes, got 0 classes"):
        Classifier(Images("bare", x))


def test_psnr_and_ssim_by_their_formulas():
    x, y = torch.rand(2, 3, 2, 14, 13, dtype=torch.float64)
    assert psnr(x, y) == pytest.approx(10 * math.log10(1 / float(((x - y) ** 2).mean())))
    assert psnr(torch.ones(2, 1, 3, 3), torch.cat([torch.ones(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)])) == pytest.approx(
        10 * math.log10(2)
    )
    assert ssim(x, x) == pytest.approx(1.0) and psnr(x, x) == math.inf
    place = torch.arange(11.0, dtype=torch.float64) - 5
    window = torch.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for p, q in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        for i in range(4):
            for j in range(3):
                u, v = p[i : i + 11, j : j + 11], q[i : i + 11, j : j + 11]
                mu, mv = (window * u).sum(), (window * v).sum()
                su, sv = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
                both = (window * (u - mu) * (v - mv)).sum()
                light = (2 * mu * mv + 1e-4) / (mu**2 + mv**2 + 1e-4)
                found.append(light * (2 * both + 9e-4) / (su + sv + 9e-4))
    assert ssim(x, y) == pytest.approx(float(torch.stack(found).mean()))
    assert ssim(x[..., :5, :5], x[..., :5, :5]) == pytest.approx(1.0)
    for figure in (psnr, ssim):
        with pytest.raises(ValueError, match=r"y: expected images \[N, C, H, W\] as x has"):
            figure(x, y[..., :-1])
