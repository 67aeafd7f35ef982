"""Numbers of the C++ kernels at the edges of their types: float16 on every instruction set, means far from 0."""

import pytest
import torch

from genai_fast import ops, use_backend
from genai_fast.backends import unavailable
from genai_fast.kernels.common.extension import extension

pytestmark = pytest.mark.skipif(bool(unavailable("cpu", "cpu")), reason="no C++ extension")
MODULE = extension()[0]
SETS = [isa for isa, here in MODULE.instruction_sets().items() if here] if MODULE else []
FLOAT16 = 2  # as a kernel is told


@pytest.fixture(autouse=True)
def _cpu():
    torch.manual_seed(0)
    with use_backend("cpu"):
        yield


def product(isa, a, b):
    """a b in float32, rounded to float16, by the kernel of gated_act."""
    y = torch.empty_like(a)
    MODULE.kernels(isa)["gated_act"](
        a.data_ptr(), a.numel(), b.data_ptr(), b.numel(), FLOAT16, y.data_ptr(), 1, a.numel(), 0, 0, 1.0, 1.0, 1
    )
    return y


def assert_same(found, right):
    """Bit by bit, but for the bits of NaN."""
    both = found.isnan() & right.isnan()
    assert torch.equal(found.view(torch.int16)[~both], right.view(torch.int16)[~both])


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("isa", SETS)
def test_every_float16_passes_through(isa, flush):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    torch.set_flush_denormal(flush)
    try:
        found = product(isa, every, torch.ones_like(every))
    finally:
        torch.set_flush_denormal(False)
    assert_same(found, every)


@pytest.mark.parametrize("isa", SETS)
def test_float16_is_rounded_to_nearest_even(isa):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()]
    for factor in (0.5, 1 + 2**-10, 1 - 2**-11, 3 * 2**-9, 2.0**-14, 1.5 * 2**-14, 1.9990234375, 256.0, 65504.0):
        b = torch.full_like(finite, factor)
        assert_same(product(isa, finite, b), (finite.double() * b.double()).to(torch.float16))
    a, b = (torch.randn(1 << 16).mul(s).half() for s in (1.0, 1e-4))
    assert_same(product(isa, a, b), (a.double() * b.double()).to(torch.float16))


def laid_out(x, last):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 4, 64, 64), (3, 5, 7), (40, 6), (2, 3000), (20, 3, 4, 4), (2, 2, 300, 301)])
@pytest.mark.parametrize("value", [1000.123, -3e7, 1e-3])
def test_batch_norm_of_one_value_is_nothing(value, shape, last):
    """The mean's own rounding must not count as a deviation."""
    x = laid_out(torch.full(shape, value), last)
    mean, squares, _ = torch.ops.genai_fast.batch_norm_statistics(x, None, None, 0.1, 1e-5, "cpu")
    assert torch.equal(mean, x.new_full(mean.shape, value)) and not squares.any()
    assert not ops.batch_norm_act(x, activation="none").any()


@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.parametrize("shape", [(8, 4, 64, 64), (64, 6), (20, 3, 4, 4)])
def test_batch_norm_far_from_0(shape, offset, last):
    x = laid_out(torch.randn(shape) + offset, last)
    dims = [0, *range(2, x.dim())]
    mean, squares, _ = torch.ops.genai_fast.batch_norm_statistics(x, None, None, 0.1, 1e-5, "cpu")
    right = x.double().var(dims, correction=0)
    assert ((mean.double() - x.double().mean(dims)).abs() <= 2.0**-23 * offset).all()
    torch.testing.assert_close(squares.double() / (x.numel() // x.size(1)), right, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
def test_batch_norm_keeps_infinities(last):
    x = torch.randn(4, 3, 9, 9)
    x[0, 0, 0, 0], x[0, 1, 0, 0] = float("inf"), float("nan")
    mean, squares, _ = torch.ops.genai_fast.batch_norm_statistics(laid_out(x, last), None, None, 0.1, 1e-5, "cpu")
    assert mean[0] == float("inf") and mean[1].isnan() and mean[2].isfinite()
    assert not squares[:2].isfinite().any() and squares[2].isfinite()


def test_gpt_decode_far_from_0():
    """Its layer norm of positions that are all alike is their difference's, not the mean's rounding."""
    channels = 48
    weights = [torch.full((5, channels), 1000.123), torch.zeros(4, channels)]
    weights += [torch.ones(channels), torch.zeros(channels), torch.randn(5, channels)]
    logits = ops.gpt_decode(torch.tensor([[1]]), torch.zeros(0, 2, 1, 2, 4, 24), 0, weights)
    assert not logits.any()
