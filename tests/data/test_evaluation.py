"""Distances against closed forms and naive loops, on Gaussians and on real digits."""

import math

import numpy as np
import pytest
import torch

from genai_fast import data, evaluation
from genai_fast.evaluation import SampleQuality, bits_per_dim, distances, health, image_features, warnings_of
from genai_fast.evaluation.distances import active_units, frechet_distance, sample_diversity
from genai_fast.evaluation.features import DIMENSIONS, VERSION


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean: torch.Tensor, covariance: torch.Tensor, count: int = 50, seed: int = 0) -> torch.Tensor:
    """Rows [count, D] whose sample mean and covariance are the given ones, up to rounding."""
    x = normal(count, len(mean), seed=seed)
    basis, _ = torch.linalg.qr(x - x.mean(0))
    return mean + basis * (count - 1) ** 0.5 @ torch.linalg.cholesky(covariance).T


@pytest.fixture(scope="module")
def halves():
    """Two halves of 400 of 800 random digits of 28 x 28, with the labels of the second, and all other digits."""
    images = data.load("mnist")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    return images.batch(order[:400]), images.batch(order[400:800]), images.subset(order[800:])


def blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    reach = torch.arange(-6, 7).float()
    kernel = torch.exp(-0.5 * (reach / sigma) ** 2)
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2)[None, None]
    return torch.nn.functional.conv2d(torch.nn.functional.pad(x, (6, 6, 6, 6), mode="replicate"), kernel).clamp(0, 1)


# Fréchet distance


def test_frechet_of_commuting_covariances():
    # tr(A + B - 2 (A B)^1/2) is the sum of squared differences of the deviations.
    mean, other = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    deviation, second = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 0.5, 3.5]).double()
    turn, _ = torch.linalg.qr(normal(3, 3))
    a = exactly(mean, turn @ torch.diag(deviation**2) @ turn.T)
    b = exactly(other, turn @ torch.diag(second**2) @ turn.T, count=80, seed=1)
    expected = (mean - other).square().sum() + (deviation - second).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_of_covariances_that_do_not_commute():
    # For 2 x 2 matrices tr (A B)^1/2 = (tr(A B) + 2 sqrt(det(A B)))^1/2.
    a = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]]).double()
    root = math.sqrt(torch.trace(a @ b) + 2 * math.sqrt(torch.det(a @ b)))
    zero = torch.zeros(2).double()
    got = frechet_distance(exactly(zero, a), exactly(zero, b, seed=1))
    assert got == pytest.approx((torch.trace(a) + torch.trace(b)).item() - 2 * root, rel=1e-10)


def test_frechet_agrees_with_the_formula_by_eigenvalues():
    a, b = normal(200, 20) @ normal(20, 20, seed=2), normal(150, 20, seed=1) + 0.3

    def root(s):
        values, vectors = torch.linalg.eigh(s)
        return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T

    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    inner = root(root(cov_a) @ cov_b @ root(cov_a))
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.trace(cov_a + cov_b - 2 * inner)
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("rows, columns", [(2, 1), (10, 64), (300, 8)])
def test_frechet_is_a_distance(rows, columns):
    a, b = normal(rows, columns), normal(rows + 3, columns, seed=1)
    distance = frechet_distance(a, b)
    assert distance > 0
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(a.flip(0), b) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(a + 5, b + 5) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * distance, rel=1e-10)
    assert 0 <= frechet_distance(a, a) < 1e-10


def test_frechet_of_collapsed_sets():
    a = torch.zeros(5, 3)
    assert frechet_distance(a, a + 2) == pytest.approx(12.0)
    assert frechet_distance(a, exactly(torch.zeros(3).double(), 4 * torch.eye(3).double())) == pytest.approx(12.0)


@pytest.mark.parametrize(
    "a, b, said",
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), "a: expected at least 2 rows, got 1"),
        (torch.zeros(4, 3), torch.full((4, 3), math.nan), "b: expected finite values, got 4 of 4 rows"),
        (torch.zeros(4, 3), torch.full((4, 3), math.inf), "b: expected finite values"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "b: expected 3 features a row, got 2"),
        (torch.zeros(4, 3, 1), torch.zeros(4, 3), r"a: expected \[N, D\], got \[4, 3, 1\]"),
    ],
)
def test_frechet_refuses(a, b, said):
    with pytest.raises(ValueError, match=f"frechet_distance: {said}.*remedy"):
        frechet_distance(a, b)


def test_frechet_refuses_integers():
    with pytest.raises(TypeError, match=r"b: expected a floating dtype, got torch.int64; remedy: b.float\(\)"):
        frechet_distance(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64))


# Precision, recall, density, coverage


def naive_prdc(real, fake, k):
    """As the papers write it: one pair at a time."""

    def distance(x, y):
        return math.sqrt(sum((p - q) ** 2 for p, q in zip(x, y, strict=True)))

    def radii(points):
        return [sorted(distance(x, y) for j, y in enumerate(points) if j != i)[k - 1] for i, x in enumerate(points)]

    real, fake = real.tolist(), fake.tolist()
    of_real, of_fake = radii(real), radii(fake)
    inside = [[distance(x, y) <= r for y in fake] for x, r in zip(real, of_real, strict=True)]
    reached = [any(distance(x, y) <= r for y, r in zip(fake, of_fake, strict=True)) for x in real]
    columns = list(zip(*inside, strict=True))
    return (
        sum(map(any, columns)) / len(fake),
        sum(reached) / len(real),
        sum(map(sum, columns)) / len(fake) / k,
        sum(map(any, inside)) / len(real),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 1.5, 50.0])
def test_prdc_is_the_papers(k, shift):
    real, fake = normal(40, 4), 0.7 * normal(30, 4, seed=1) + shift
    assert distances.precision_recall_density_coverage(real, fake, k) == pytest.approx(
        naive_prdc(real, fake, k), abs=1e-12
    )


def test_prdc_of_identical_and_of_far_sets():
    x = normal(60, 5)
    same = distances.precision_recall_density_coverage(x, x)
    # Each sample lies in its own ball and, on average, in k balls of others.
    assert same == pytest.approx((1.0, 1.0, 6 / 5, 1.0))
    assert distances.precision_recall_density_coverage(x, x + 100) == (0.0, 0.0, 0.0, 0.0)


def test_prdc_sees_dropped_modes_and_outliers():
    real = torch.cat([normal(100, 3), normal(100, 3, seed=1) + 20])
    dropped = distances.precision_recall_density_coverage(real, normal(200, 3, seed=2))
    assert dropped.precision > 0.9 and dropped.recall < 0.6 and dropped.coverage < 0.6
    strays = distances.precision_recall_density_coverage(real, torch.cat([real[:100], normal(100, 3, seed=3) + 200]))
    assert strays.precision == 0.5


def test_prdc_in_chunks_is_the_same(monkeypatch):
    real, fake = normal(70, 6), normal(50, 6, seed=1)
    whole = distances.precision_recall_density_coverage(real, fake)
    monkeypatch.setattr(distances, "_CHUNK", 130)  # two rows at a time
    assert distances.precision_recall_density_coverage(real, fake) == whole


def test_prdc_refuses():
    with pytest.raises(ValueError, match="fake: expected at least 6 rows, got 5; remedy"):
        distances.precision_recall_density_coverage(normal(6, 2), normal(5, 2))
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        distances.precision_recall_density_coverage(normal(6, 2), normal(6, 2), k=0)


# Diversity and active units


def test_diversity_counts_distinct_samples():
    real = 100 * normal(60, 8)  # so far from each other that each counts as one
    for distinct in (1, 6, 30, 60):
        assert sample_diversity(real[torch.arange(60) % distinct], real) == pytest.approx(distinct / 60, rel=0.05)
    with pytest.raises(ValueError, match="real: expected samples that differ"):
        sample_diversity(real, torch.ones(60, 8))


def test_active_units():
    mu = exactly(torch.tensor([0.0, 5.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 0.009, 0.011]).double()))
    assert active_units(mu) == 2
    assert active_units(mu, threshold=0.1) == 1
    assert active_units(torch.ones(4, 3)) == 0


# Features


def test_features_are_pinned():
    """A change of these values changes every figure: raise VERSION then."""
    ramp = torch.linspace(0, 1, 28 * 28).view(1, 1, 28, 28)
    found = image_features(ramp)
    assert VERSION == 1 and found.shape == (1, DIMENSIONS) and found.dtype == torch.float32
    torch.testing.assert_close(
        found[0, [0, 1, 16, 40, 72, 103]],
        torch.tensor([3.72411, 0.06287, 0.6153, 1.5353, 4.10847, 0.46443]),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (3, 32, 32), (1, 33, 20), (3, 64, 48), (1, 256, 256)])
def test_features_of_any_size(shape):
    x = normal(3, *shape).float().sigmoid().requires_grad_()
    found = image_features(x)
    assert found.shape == (3, DIMENSIONS) and found.isfinite().all() and not found.requires_grad
    torch.testing.assert_close(image_features(x[1:2]), found[1:2], rtol=1e-4, atol=1e-4)


def test_grey_is_three_equal_channels():
    x = normal(2, 1, 28, 28).float().sigmoid()
    torch.testing.assert_close(image_features(x.expand(-1, 3, -1, -1)), image_features(x), rtol=1e-5, atol=1e-5)


def test_features_do_not_depend_on_batch_seed_dtype_or_autocast(halves, monkeypatch):
    x = halves[0][:40]
    found = image_features(x)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(image_features(x), found)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(image_features(x.double()), found)
    monkeypatch.setattr(evaluation.features, "_BATCH", 7)
    torch.testing.assert_close(image_features(x), found, rtol=1e-4, atol=1e-4)
    assert image_features(x[:0]).shape == (0, DIMENSIONS)


def test_features_refuse():
    for bad in (torch.zeros(2, 2, 28, 28), torch.zeros(2, 1, 7, 28), torch.zeros(2, 1, 28, 257), torch.zeros(2, 784)):
        with pytest.raises(ValueError, match=r"image_features: images: expected \[N, C, H, W\].*remedy"):
            image_features(bad)
    for bad in (-0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"expected pixels in \[0, 1\].*remedy"):
            image_features(torch.full((1, 1, 8, 8), bad))
    with pytest.raises(TypeError, match="remedy"):
        image_features(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_on_a_gpu_are_those_on_the_cpu():
    """Of spots that need no dataset: a machine with a GPU may have no package that holds one."""
    x = blurred(torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)), 1.5)
    torch.testing.assert_close(image_features(x, "cuda").cpu(), image_features(x), rtol=1e-3, atol=1e-3)


DAMAGE = {
    "noise": ((0.02, 0.05, 0.1, 0.2, 0.4), lambda x, q: (x + q * normal(*x.shape).float()).clamp(0, 1)),
    "blur": ((0.6, 1.0, 1.5, 2.5), blurred),
    "duplicates": ((0.5, 0.75, 0.9, 0.98), lambda x, q: x[torch.arange(len(x)) % round(len(x) * (1 - q))]),
    "contrast": ((0.1, 0.2, 0.4, 0.8), lambda x, q: (1 - q) * x + q * x.mean()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_distance_rises_with_damage_to_digits(halves, kind):
    real, other, _ = halves
    levels, damaged = DAMAGE[kind]
    features = image_features(real)
    found = [frechet_distance(features, image_features(x)) for x in (other, *(damaged(other, q) for q in levels))]
    assert found == sorted(found), found
    assert found[-1] > 5 * found[0], found


def test_distance_rises_with_the_number_of_missing_digits(halves):
    real, _, rest = halves
    features, made = image_features(real), image_features(rest.batch(slice(None, 3000)))
    labels = rest.labels[:3000]
    found = []
    for missing in (0, 1, 3, 5, 7, 9):
        # The mean over which ones are missing: without 0 and 1 the strokes' mean length is again that of the data.
        distance = []
        for first in range(10):
            kept = (labels - first) % 10 >= missing
            distance.append(frechet_distance(features, made[kept][:250]))
        found.append(sum(distance) / 10)
    assert found == sorted(found), found
    assert found[-1] > 5 * found[0], found


# Bits per dimension


@pytest.mark.parametrize("signed", [False, True])
def test_bits_of_a_gaussian_are_those_of_its_mass(signed):
    x, mean = normal(5, 12).sigmoid(), normal(5, 12, seed=1).sigmoid()
    x, mean = (2 * v - 1 if signed else v for v in (x, mean))
    nats = (x - mean).square().sum(1).mean().item()
    density = torch.distributions.Normal(mean, math.sqrt(0.5))
    bin_width = (2 if signed else 1) / 256
    expected = -(density.log_prob(x) + math.log(bin_width)).sum(1).mean().item() / 12 / math.log(2)
    assert bits_per_dim(nats, 12, "gaussian", signed=signed) == pytest.approx(expected, rel=1e-12)
    # The mass of the bin itself, which the density times its width approximates.
    half = bin_width / 2
    mass = -(density.cdf(x + half) - density.cdf(x - half)).log().sum(1).mean().item() / 12 / math.log(2)
    assert bits_per_dim(nats, 12, "gaussian", signed=signed) == pytest.approx(mass, abs=1e-4)


def test_bits_of_bernoulli():
    assert bits_per_dim(784 * math.log(2), 784, "bernoulli") == pytest.approx(1.0)  # a fair coin a pixel
    assert bits_per_dim(0.0, 10, "gaussian", levels=2) == pytest.approx(1 + 0.5 * math.log2(math.pi))


def test_bits_refuse():
    for arguments, said in (
        ((1.0, 0, "bernoulli"), "dimensions: expected at least 1, got 0"),
        ((1.0, 4, "laplace"), "likelihood: expected 'bernoulli' or 'gaussian', got 'laplace'"),
        ((1.0, 4, "gaussian", 1), "levels: expected at least 2, got 1"),
    ):
        with pytest.raises(ValueError, match=f"bits_per_dim: {said}; remedy"):
            bits_per_dim(*arguments)


# Quality


def test_quality_of_real_digits_and_of_bad_ones(halves):
    real, other, rest = halves
    judge = SampleQuality(real)
    assert judge.count == 400
    good = judge.quality(other)
    assert list(good) == ["frechet_distance", "precision", "recall", "density", "coverage", "diversity"]
    assert all(type(value) is float for value in good.values())
    assert good["diversity"] == pytest.approx(1.0, abs=0.15) and min(good["precision"], good["recall"]) > 0.9
    one_digit = judge.quality(rest.batch(torch.nonzero(rest.labels == 1)[:, 0][:400]))
    assert one_digit["coverage"] < 0.5 * good["coverage"] and one_digit["diversity"] < 0.8 * good["diversity"]
    collapsed = judge.quality(other[torch.arange(400) % 4])
    assert collapsed["diversity"] < 0.05 and collapsed["recall"] < 0.2
    noise = judge.quality(normal(400, 1, 28, 28).float().sigmoid())
    assert noise["precision"] == 0.0 and noise["frechet_distance"] > 100 * good["frechet_distance"]
    assert warnings_of(good, samples=other, real=real, diversity=good["diversity"], coverage=good["coverage"]) == []


def test_quality_takes_a_fixed_random_part_of_the_data(halves):
    images = data.load("mnist")  # sorted by digit
    x = images.batch(slice(None))
    one, same = SampleQuality(x, 100), SampleQuality(x, 100)
    assert one.count == 100 and one.quality(halves[1]) == same.quality(halves[1])
    assert one.quality(halves[1])["coverage"] > 0.9  # all digits are there


def test_quality_refuses(halves):
    judge = SampleQuality(halves[0], 10)
    with pytest.raises(ValueError, match=r"fakes: expected \[M, 1, 28, 28\].*got \[3, 784\]; remedy"):
        judge.quality(torch.zeros(3, 784))
    with pytest.raises(ValueError, match=r"tanh"):
        judge.quality(2 * halves[1] - 1)
    with pytest.raises(ValueError, match="at least 6 real images, got 5"):
        SampleQuality(halves[0], 5)


# Diagnoses


def of_d(accuracy, **more):
    return {"discriminator_accuracy": accuracy, **more}


@pytest.mark.parametrize(
    "well, ill, said",
    [
        ({"diversity": 0.2}, {"diversity": 0.19}, "mode collapse"),
        (of_d(1.0, generator_loss=4.0), of_d(1.0, generator_loss=4.1), "discriminator wins"),
        (of_d(0.99, generator_loss=9.0), of_d(0.995, generator_loss=9.0), "discriminator wins"),
        (of_d(0.2), of_d(0.19), "discriminator loses"),
        (of_d(0.5, coverage=0.1), of_d(0.5, coverage=0.09), "discriminator guesses"),
        (of_d(0.56, coverage=0.0), of_d(0.54, coverage=0.0), "discriminator guesses"),
        ({"active_units": 1, "kl": 3.0}, {"active_units": 0, "kl": 3.0}, "posterior collapse"),
        ({"kl": 0.2, "latent": 20}, {"kl": 0.19, "latent": 20}, "posterior collapse"),
        ({"figures": {"loss": 1.0}}, {"figures": {"loss": math.nan}}, "not finite: loss"),
        ({"kl": 1.0}, {"kl": math.inf}, "not finite: kl"),
        ({"samples": torch.zeros(2, 3)}, {"samples": torch.full((2, 3), math.nan)}, "not finite: samples"),
    ],
)
def test_each_diagnosis_on_both_sides_of_its_threshold(well, ill, said):
    assert warnings_of(**well) == []
    (sentence,) = warnings_of(**ill)
    assert said in sentence and "remedy: " in sentence


def test_saturation_is_beside_the_data():
    real = torch.full((10, 10), 0.5)
    real[:5] = 1.0
    samples = real.clone()
    samples[5:, :2], samples[5:9, 2] = 0.004, 0.004  # 14 percent more
    assert warnings_of(samples=samples, real=real) == []
    samples[9, 8:] = 0.996
    (sentence,) = warnings_of(samples=samples, real=real)
    assert sentence.startswith("saturation: 66% of the samples' pixels are at black or white, 50% of the data's")


def test_nothing_given_nothing_said():
    assert warnings_of() == [] and health.LEAST_DIVERSITY < 1
