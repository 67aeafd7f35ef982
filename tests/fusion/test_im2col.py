"""Convolutions as products of unfolded patches: every geometry, in float64 and narrow types, to second order."""

import itertools

import pytest
import torch
from torch import nn

from genai_fast.fusion import im2col
from genai_fast.fusion.operands import Convolution

GEOMETRIES = [  # kernel, stride, padding
    (1, 1, 0), (2, 2, 0), (3, 1, 1), (3, 2, 1), (4, 2, 1), (5, 2, 2), (4, 1, 3), ((3, 5), (2, 1), (0, 2)), (2, 3, 1),
]  # fmt: skip


def convolutions():
    for (kernel, stride, padding), bias in itertools.product(GEOMETRIES, (True, False)):
        yield nn.Conv2d(3, 5, kernel, stride, padding, bias=bias)
        for more in (0, 1):
            if more < min(stride if isinstance(stride, tuple) else (stride, stride)):
                yield nn.ConvTranspose2d(3, 5, kernel, stride, padding, more, bias=bias)


def inputs(conv, dtype=torch.float64, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=dtype, generator=generator).contiguous(memory_format=layout).requires_grad_()
    return conv.to(dtype), x


def results(function, conv, x):
    """y, its strides' format apart, and every gradient of a fixed weighting."""
    y = function(x)
    upstream = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *conv.parameters()], upstream)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("conv", list(convolutions()), ids=str)
def test_every_geometry(conv, layout):
    conv, x = inputs(conv, layout=layout)
    assert not im2col.why_not(Convolution.of(conv), x)
    found, expected = results(lambda x: im2col.convolved(Convolution.of(conv), x), conv, x), results(conv, conv, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_strided_input_and_gradient(transposed):
    conv, _ = inputs((nn.ConvTranspose2d if transposed else nn.Conv2d)(3, 5, 4, 2, 1))
    strided = torch.randn(2, 6, 5, 6, dtype=torch.float64)[:, ::2].transpose(2, 3).requires_grad_()
    for make in (lambda y: y.sum(), lambda y: (y * y).flip(3).sum()):  # an expanded gradient, a reversed one
        found, expected = (
            torch.autograd.grad(make(f(strided)), [strided, *conv.parameters()])
            for f in (lambda x: im2col.convolved(Convolution.of(conv), x), conv)
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_rounding_is_that_of_a_convolution(transposed, dtype):
    """Errors against float64 at most twice PyTorch's own, three times for gradients, and a floor."""
    torch.manual_seed(0)
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(48, 64, 4, 2, 1).to(dtype)
    x = torch.randn(8, 48, 8, 8, dtype=dtype, requires_grad=True)
    found, eager = results(lambda x: im2col.convolved(Convolution.of(conv), x), conv, x), results(conv, conv, x)
    wide, x = conv.double(), x.detach().double().requires_grad_()
    for k, (a, b, truth) in enumerate(zip(found, eager, results(wide, wide, x), strict=True)):
        error, its = ((y.double() - truth).norm() / truth.norm() for y in (a, b))
        assert a.dtype is dtype and error <= (3 if k else 2) * its + 1e-6


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_gradients_and_many_at_once(transposed):
    conv, x = inputs((nn.ConvTranspose2d if transposed else nn.Conv2d)(3, 2, 3, 2, 1))
    x = x.detach()[:1, :, :3, :3].requires_grad_()

    def function(x, weight):
        return im2col._Patches.call(x, weight, (2, 2), (1, 1), (0, 0) if transposed else None)

    arguments = (x, conv.weight)
    assert torch.autograd.gradcheck(function, arguments) and torch.autograd.gradgradcheck(function, arguments)
    y = function(*arguments)
    many = torch.randn(3, *y.shape, dtype=y.dtype)
    found = torch.autograd.grad(y, arguments, many, is_grads_batched=True, retain_graph=True)
    one = [torch.autograd.grad(y, arguments, upstream, retain_graph=True) for upstream in many]
    for a, b in zip(found, zip(*one, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


def test_autocast_gives_its_dtype_and_the_parameters_their_own():
    conv, x = nn.Conv2d(3, 5, 4, 2, 1), torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = im2col.convolved(Convolution.of(conv), x), conv(x)
    assert y.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert {t.grad.dtype for t in (x, *conv.parameters())} == {torch.float32}


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(3, 5, 3, groups=1, dilation=2), (2, 3, 8, 8)),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8)),
        (nn.Conv2d(3, 5, 3, padding="same"), (2, 3, 8, 8)),
        (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (2, 3, 8, 8)),
        (nn.Conv2d(3, 5, 3), (2, 3, 20, 20)),
        (nn.Conv2d(3, 5, 9), (2, 3, 8, 8)),
        (nn.Conv2d(3, 5, 3), (2, 4, 8, 8)),
        (nn.ConvTranspose2d(1024, 1024, 4, 2, 1), (64, 1024, 8, 8)),
    ],
    ids=["dilation", "groups", "same", "reflect", "large", "kernel", "channels", "memory"],
)
def test_what_is_left_to_pytorch(conv, shape):
    assert im2col.why_not(Convolution.of(conv), torch.empty(shape, device="cpu"))
