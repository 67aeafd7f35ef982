"""The random stream: the same integers on every backend, normals that are normal, reproducible draws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genai_fast import ops, use_backend
from genai_fast.backends import cpu_kernels, unavailable
from genai_fast.kernels.common import philox

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = st.integers(-(2**63), 2**63 - 1)
OFFSETS = st.one_of(st.integers(0, 100), st.integers(2**34 - 300, 2**34 + 300), st.integers(0, 2**61))


def _backends():
    return [backend for backend in ("cpu", "triton") if not unavailable(backend, DEVICE)]


def _words(backend, count, seed, offset):
    tensor = torch.tensor(seed, device=DEVICE)
    if backend == "cpu":
        out = torch.empty(count, dtype=torch.int64)
        cpu_kernels()[0]["philox_words"](out.data_ptr(), tensor.data_ptr(), offset, count)
        return out
    from genai_fast.kernels.reparameterize.triton_kernel import philox_words

    return philox_words(count, tensor, offset).cpu()


def _normals(backend, count, seed, offset=0):
    zero = torch.zeros(1, count, device=DEVICE)
    with use_backend(backend):
        return ops.reparameterize(zero, zero, seed=seed, offset=offset).flatten().cpu()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known answers for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))
    ],
)
def test_known_answer(counter, key, expected):
    got = philox.philox(torch.tensor([counter[0]]), torch.tensor(key[0]))
    assert tuple(int(w) for w in got) == expected


@pytest.mark.parametrize("backend", _backends())
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, offset=OFFSETS, count=st.integers(1, 300))
def test_integers_are_bit_equal(backend, seed, offset, count):
    expected = philox.words(count, torch.tensor(seed), offset)
    assert torch.equal(_words(backend, count, seed, offset), expected)


@pytest.mark.parametrize("backend", _backends())
@pytest.mark.parametrize("seed", [0, 1, -5, 2**62 + 12345])
def test_normals_are_close_to_float64(backend, seed):
    count = 2**16 + 3
    expected = philox.normals(count, torch.tensor(seed), 5)
    assert (_normals(backend, count, seed, 5).double() - expected).abs().max() <= 4e-6


@pytest.mark.parametrize("backend", _backends())
def test_largest_and_smallest_radius(backend):
    """Positions whose uniform lies next to 0 and next to 1: the tail, and where a coarse logarithm would fail."""
    stream = philox.words(2**20, torch.tensor(3)).view(-1, 4)[:, 0] >> 9
    for counter in (int(stream.argmin()), int(stream.argmax())):
        expected = philox.normals(4, torch.tensor(3), 4 * counter)
        assert (_normals(backend, 4, 3, 4 * counter).double() - expected).abs().max() <= 4e-6


@pytest.mark.parametrize("backend", _backends())
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 6])
def test_offset_continues_the_stream(backend, offset):
    """Ranks that hold rows of one batch draw what one process would."""
    whole = torch.zeros(6, 7, device=DEVICE)
    with use_backend(backend):
        z = ops.reparameterize(whole, whole, seed=11, offset=offset)
        firsts, cuts = (0, 2, 3), whole.split((2, 1, 3))
        parts = [ops.reparameterize(x, x, seed=11, offset=offset + 7 * k) for k, x in zip(firsts, cuts, strict=True)]
    assert torch.equal(z, torch.cat(parts))


def _sample(seed, count=2**20):
    """From the fastest backend: the others draw the same integers."""
    return _normals((_backends() or ["reference"])[0], count, seed).double().numpy()


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_moments(seed):
    x = _sample(seed)
    n = len(x)
    # Standard errors of the first four moments of a normal sample; five of them.
    for order, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs((x**order).mean() - moment) < 5 * math.sqrt(variance / n)


@pytest.mark.parametrize("seed", [0, 7])
def test_kolmogorov_smirnov(seed):
    x = np.sort(_sample(seed))
    n = len(x)
    cdf = torch.special.ndtr(torch.from_numpy(x)).numpy()
    ranks = np.arange(1, n + 1) / n
    distance = max((ranks - cdf).max(), (cdf - ranks + 1 / n).max())
    assert distance < 1.95 / math.sqrt(n)  # the 0.1 % point


def _correlation(a, b):
    return abs(np.corrcoef(a, b)[0, 1]) * math.sqrt(len(a))


def test_no_correlation_between_lanes_counters_and_seeds():
    x, next_seed = _sample(5), _sample(6)
    lanes = x.reshape(-1, 4)
    for i in range(4):
        for j in range(i):
            assert _correlation(lanes[:, i], lanes[:, j]) < 5
            assert _correlation(lanes[:, i] ** 2, lanes[:, j] ** 2) < 5
        assert _correlation(lanes[1:, i], lanes[:-1, i]) < 5
    assert _correlation(x, next_seed) < 5
    assert _correlation(x**2, next_seed**2) < 5


def test_manual_seed_makes_draws_reproducible():
    mu = torch.zeros(4, 9, device=DEVICE)

    def draw():
        return ops.reparameterize(mu, mu)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    again = draw()
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("grad", [False, True])  # with a backward, common subexpressions of the graph are merged
def test_compiled_draws_are_eager_draws(grad):
    torch._dynamo.reset()
    mu, logvar = torch.zeros(4, 9, device=DEVICE, requires_grad=grad), torch.zeros(4, 9, device=DEVICE)

    def twice(mu):
        return ops.reparameterize(mu, logvar), ops.reparameterize(mu, logvar)

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    a, b = compiled(mu)
    torch.manual_seed(3)
    expected = twice(mu)
    assert torch.equal(a, expected[0])
    assert torch.equal(b, expected[1])
    assert not torch.equal(a, b)


def test_int_and_tensor_seeds_are_the_same():
    mu = torch.zeros(2, 5, device=DEVICE)
    for seed in (0, -1, 2**63 - 1):
        tensor = torch.tensor(seed, device=DEVICE)
        assert torch.equal(ops.reparameterize(mu, mu, seed=seed), ops.reparameterize(mu, mu, seed=tensor))


def test_kl_does_not_change_the_sample():
    mu, logvar = torch.randn(5, 33, device=DEVICE), torch.randn(5, 33, device=DEVICE)
    assert torch.equal(ops.reparameterize(mu, logvar, seed=1), ops.reparameterize_kl(mu, logvar, seed=1)[0])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU's memory and speed")
def test_more_than_2_31_elements():
    count = 2**31 + 12345
    zero = torch.zeros((1, count), dtype=torch.bfloat16, device=DEVICE)
    z = ops.reparameterize(zero, zero, seed=4)
    tail = ops.reparameterize(zero[:, -5000:], zero[:, -5000:], seed=4, offset=count - 5000)
    assert torch.equal(z[:, -5000:], tail)
