"""upfirdn2d beyond the registry's cases: layouts, long filters, what it composes to, instruction sets, raw calls."""

import pytest
import torch

from genai_fast import ops, use_backend
from genai_fast.kernels.upfirdn2d import reference

FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


def _normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _exact(x, filter, up=1, down=1, padding=(0, 0, 0, 0), gain=1.0, flip=False):
    """The definition in float64: zeros inserted, padding or crop, a turned filter, every down-th pixel."""
    n, c, h, w = x.shape
    (uy, ux), (dy, dx) = ((v, v) if isinstance(v, int) else v for v in (up, down))
    left, right, top, bottom = padding
    z = torch.zeros(n, c, h * uy, w * ux, dtype=torch.float64)
    z[:, :, ::uy, ::ux] = x.double()
    wide = torch.zeros(n, c, h * uy + top + bottom, w * ux + left + right, dtype=torch.float64)
    for y in range(wide.size(2)):
        for k in range(wide.size(3)):
            if 0 <= y - top < z.size(2) and 0 <= k - left < z.size(3):
                wide[:, :, y, k] = z[:, :, y - top, k - left]
    f = torch.outer(filter, filter) if filter.dim() == 1 else filter
    f = (f if flip else f.flip(0, 1)).double()
    windows = wide.unfold(2, f.size(0), dy).unfold(3, f.size(1), dx)
    return gain * (windows * f).sum((-1, -2))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_definition(backend, layout):
    calls = (
        (FILTER, {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0}),
        (FILTER, {"down": 2, "padding": (1, 1, 1, 1)}),
        (_normal(3, 5), {"up": (3, 1), "down": (1, 2), "padding": (-1, 4, 3, -2), "flip": True}),
        (_normal(7), {"up": 2, "down": 3, "padding": (5, 2, 0, 6), "gain": -0.5}),
    )
    x = _normal(2, 9, 6, 7).contiguous(memory_format=layout)
    for filter, settings in calls:
        with use_backend(backend):
            y = ops.upfirdn2d(x, filter, **settings)
        torch.testing.assert_close(y.double(), _exact(x, filter, **settings), rtol=1e-5, atol=1e-5)
        assert y.is_contiguous(memory_format=layout)


def test_filters_in_a_row_are_their_convolution():
    x, long = _normal(2, 3, 12, 10), torch.nn.functional.conv1d(FILTER[None, None], FILTER[None, None], padding=3)[0, 0]
    twice = ops.upfirdn2d(ops.upfirdn2d(x, FILTER, padding=3), FILTER, padding=(0, 3, 0, 3))
    torch.testing.assert_close(twice, ops.upfirdn2d(x, long, padding=(3, 6, 3, 6)), rtol=1e-5, atol=1e-6)


def test_an_upsampled_constant_stays_one_and_halving_undoes_doubling_of_a_line():
    y = ops.upfirdn2d(torch.ones(1, 2, 8, 8), FILTER, 2, padding=(2, 1, 2, 1), gain=4.0)
    torch.testing.assert_close(y[..., 2:-2, 2:-2], torch.ones(1, 2, 12, 12))
    line = torch.arange(16.0).expand(1, 1, 16, 16)
    down = ops.upfirdn2d(line, FILTER, down=2, padding=1)
    torch.testing.assert_close(down[0, 0, 3, 2:-2], torch.arange(16.0).view(8, 2).mean(1)[2:-2])


def test_the_third_derivative_is_again_the_op(monkeypatch):
    x, filter = _normal(1, 2, 5, 4).double().requires_grad_(), FILTER.double()
    with use_backend("reference"):
        y = ops.upfirdn2d(x, filter, 2, padding=(2, 1, 2, 1))
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        assert torch.autograd.gradcheck(
            lambda v: torch.autograd.grad(
                ops.upfirdn2d(v, filter, 2, padding=(2, 1, 2, 1)).pow(3).sum(), v, create_graph=True
            )[0],
            (x,),
        )
        (third,) = torch.autograd.grad(second.sum(), x)
    assert third.isfinite().all() and third.abs().max() > 0


def test_kernels_serve_the_second_derivative(monkeypatch):
    """Its backward is the op, not the reference."""

    def refused(*arguments):
        raise AssertionError("the reference was called")

    x = _normal(1, 2, 5, 4).requires_grad_()
    monkeypatch.setattr(reference, "upfirdn2d", refused)
    (first,) = torch.autograd.grad(ops.upfirdn2d(x, FILTER, padding=2).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.shape == x.shape


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_raw_calls_that_do_not_fit_are_refused(backend):
    call, x = torch.ops.genai_fast.upfirdn2d, torch.zeros(2, 3, 8, 8)
    both = [1, 1]
    for arguments in (
        (x[0], FILTER, both, both, [0] * 4),
        (x, FILTER.double(), both, both, [0] * 4),
        (x, FILTER, [0, 1], both, [0] * 4),
        (x, FILTER, both, both, [-5, 0, 0, 0]),
        (x, FILTER[:0], both, both, [0] * 4),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call(*arguments, 1.0, False, backend)
