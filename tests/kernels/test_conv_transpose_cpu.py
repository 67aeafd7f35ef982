"""The C++ kernels of transposed convolution to few channels, on each instruction set."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from genai_fast.kernels.common.activations import ACTIVATIONS, activate
from genai_fast.kernels.common.extension import extension
from genai_fast.kernels.conv_transpose import cpu_kernel
from genai_fast.kernels.conv_transpose.cpu_kernel import conv_transpose
from genai_fast.kernels.conv_transpose.shapes import FEW_CHANNELS as FEW

pytestmark = [pytest.mark.skipif(extension()[0] is None, reason=extension()[1]), pytest.mark.usefixtures("one_thread")]
ISAS = [isa for isa, here in extension()[0].instruction_sets().items() if here] if extension()[0] else []
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    kernels = extension()[0].kernels(request.param)

    class Kernels:
        def __getattr__(self, name):
            return lambda *arguments: kernels[name](*arguments, torch.get_num_threads())

    monkeypatch.setattr(cpu_kernel, "cpp", Kernels())
    return request.param


def _normal(*shape, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.to(memory_format=layout) if x.dim() == 4 else x


def _eager(x, weight, bias, stride, padding, more, activation="none", slope=0.2):
    bias = bias if bias is None else bias.to(x.dtype)
    return (activate(F.conv_transpose2d(x, weight, bias, stride, padding, more), activation, slope),)


def _error(y, truth):
    return ((y.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).item()


def _expected(eager, tensors, settings, times):
    """float64 results of eager(*tensors, *settings), and the errors allowed: so many times those in the own dtype."""
    truths = eager(*(t if t is None else t.double() for t in tensors), *settings)
    allowed = [times * _error(y, truth) + 1e-6 for y, truth in zip(eager(*tensors, *settings), truths, strict=True)]
    return truths, allowed


def _assert_right(
    x, weight, bias, stride=(2, 2), padding=(1, 1), more=(0, 0), activation="none", slope=0.2, expected=None
):
    """Twice PyTorch's own error at most, channels last."""
    settings = (stride, padding, more, activation, slope)
    (truth,), (allowed,) = expected or _expected(_eager, (x, weight, bias), settings, 2)
    y = conv_transpose(x, weight, bias, *settings)
    assert y.dtype is x.dtype and y.shape == truth.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert _error(y, truth) <= allowed, (x.shape, weight.shape, settings)
    return y


def _settings(size, kernel):
    """All (stride, padding, output_padding) with a result, the two dimensions alike."""
    for stride, padding in itertools.product((1, 2), range(kernel)):
        for more in range(stride):
            if (min(size) - 1) * stride - 2 * padding + kernel + more >= 1:
                yield (stride,) * 2, (padding,) * 2, (more,) * 2


@functools.cache
def _geometries(few):
    """(settings, x, weight, bias, what is expected of the result): for each instruction set and layout the same."""
    x, bias, cases = _normal(2, 7, 5, 3), _normal(few, seed=1), []
    for kernel in range(1, 7):
        weight = _normal(7, few, kernel, kernel, seed=2)
        for settings in _settings((5, 3), kernel):
            cases.append((settings, x, weight, bias, _expected(_eager, (x, weight, bias), settings, 2)))
    return cases


@pytest.mark.parametrize("few", (1, 2, 3, 5, 8))
@pytest.mark.parametrize("layout", LAYOUTS, ids=("planes", "last"))
def test_every_geometry(isa, few, layout):
    for settings, x, weight, bias, expected in _geometries(few):
        _assert_right(x.to(memory_format=layout), weight, bias, *settings, expected=expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=("planes", "last"))
@pytest.mark.parametrize(
    "size, kernel, stride, padding, more",
    [
        ((9, 33), (4, 4), (2, 2), (1, 1), (0, 0)),
        ((4, 150), (5, 5), (2, 2), (2, 2), (1, 1)),  # more than one tile a row
        ((3, 140), (6, 6), (1, 1), (0, 5), (0, 0)),
        ((6, 5), (3, 4), (1, 2), (2, 1), (0, 1)),
        ((6, 5), (2, 5), (2, 1), (0, 3), (1, 0)),
        ((1, 37), (1, 4), (1, 2), (0, 1), (0, 0)),  # one-dimensional
        ((37, 1), (4, 1), (2, 1), (1, 0), (0, 0)),
        ((1, 1), (4, 4), (1, 1), (0, 0), (0, 0)),
    ],
)
def test_planes_of_any_shape(isa, layout, size, kernel, stride, padding, more):
    for few in (1, 3, FEW):
        weight = _normal(20, few, *kernel, seed=2)
        _assert_right(_normal(2, 20, *size, layout=layout), weight, _normal(few, seed=1), stride, padding, more, "tanh")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=("planes", "last"))
def test_activations_and_no_bias(isa, activation, layout):
    x, weight = _normal(2, 16, 6, 9, layout=layout), _normal(16, 3, 4, 4, seed=2)
    for bias in (None, _normal(3, seed=1)):
        _assert_right(x, weight, bias, activation=activation)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("layout", LAYOUTS, ids=("planes", "last"))
def test_narrow_dtypes(isa, dtype, layout):
    x, weight = _normal(2, 19, 7, 11, dtype=dtype, layout=layout), _normal(19, 3, 4, 4, dtype=dtype, seed=2)
    wide = _normal(3, seed=1)
    for bias in (None, wide, wide.to(dtype)):
        _assert_right(x, weight, bias, activation="tanh")


def test_any_strides(isa):
    weight, bias = _normal(8, 3, 4, 4, layout=torch.channels_last, seed=2), _normal(6, seed=1)[::2]
    wide = _normal(4, 16, 12, 14)
    views = (
        wide[::2, ::2, 1:8, 2:13],  # pixels of a row one beside the other
        wide.to(memory_format=torch.channels_last)[:, 8:, ::2, ::3],  # channels one beside the other
        wide[:, :8].transpose(2, 3),
        wide[:, :1, :1, :1].expand(4, 8, 5, 6),
        wide[:, :8, :, ::2],
        wide.to(memory_format=torch.channels_last)[:, 8:, :, ::3].to(torch.bfloat16),
        wide.to(torch.bfloat16)[::2, ::2, 1:8, 2:13],
    )
    for x in views:
        _assert_right(x, weight.to(x.dtype), bias)
    one = wide[:, 3:4]
    _assert_right(one, weight[3:4], bias)
    _assert_right(one.to(memory_format=torch.channels_last), weight[3:4], bias)


def test_large_planes_are_read_by_rows(isa):
    _assert_right(_normal(1, 10, 120, 130), _normal(10, 3, 4, 4, seed=2), None, activation="tanh")


@pytest.mark.parametrize("batch, layout", list(itertools.product((1, 3, 33), LAYOUTS)))
def test_threads_do_not_change_a_bit(isa, batch, layout):
    x, weight, bias = _normal(batch, 24, 17, 13, layout=layout), _normal(24, 3, 5, 5, seed=2), _normal(3, seed=1)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(conv_transpose(x, weight, bias, [2, 2], [2, 2], [1, 1], "tanh", 0.0))
    assert all(torch.equal(results[0], other) for other in results[1:])
    alone = conv_transpose(x[-1:], weight, bias, [2, 2], [2, 2], [1, 1], "tanh", 0.0)
    assert torch.equal(alone, results[0][-1:])


@pytest.mark.parametrize("layout", LAYOUTS, ids=("planes", "last"))
def test_special_values_stay_where_they_belong(isa, layout):
    for kernel, value in itertools.product((3, 4, 5), (float("nan"), float("inf"), -float("inf"))):
        x, weight = _normal(2, 5, 6, 7, layout=layout), _normal(5, 3, kernel, kernel, seed=2)
        x[0, 2, 3, 4] = x[1, 0, 0, 6] = value
        y = conv_transpose(x, weight, None, [2, 2], [1, 1], [0, 0], "none", 0.0)
        truth = _eager(x.double(), weight.double(), None, 2, 1, 0)[0].float()
        finite = truth.isfinite()
        assert torch.equal(y.isfinite(), finite)
        assert torch.equal(y[~finite].nan_to_num(7.0), truth[~finite].nan_to_num(7.0))
        torch.testing.assert_close(y[finite], truth[finite], rtol=1e-4, atol=1e-5)


def test_empty_batch(isa):
    y = conv_transpose(_normal(0, 4, 5, 5), _normal(4, 3, 4, 4), None, [2, 2], [1, 1], [0, 0], "tanh", 0.0)
    assert y.shape == (0, 3, 10, 10)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=_normal(4, FEW + 1, 4, 4)), f"expected 1 to {FEW} output channels, got 9"),
        (dict(weight=_normal(4, 3, 7, 4)), r"expected kernel sizes of 1 to 6, got \[7, 4\]"),
        (dict(weight=_normal(5, 3, 4, 4)), r"expected \[N, C, H, W\]"),
        (dict(stride=[3, 1]), r"expected two of 1 to 2, got \[3, 1\]"),
        (dict(padding=[9, 1]), "expected a result of at least 1 pixel"),
        (dict(bias=torch.zeros(4)), r"expected \(3,\) on cpu, got \(4,\)"),
        (dict(x=_normal(1, 4, 5, 5).double()), "expected float32, bfloat16 or float16"),
    ],
)
def test_refuses(change, message):
    good = dict(x=_normal(1, 4, 5, 5), weight=_normal(4, 3, 4, 4), bias=None, stride=[2, 2], padding=[1, 1])
    with pytest.raises(ValueError, match=message):
        conv_transpose(**{**good, **change}, output_padding=[0, 0], activation="none", slope=0.0)


def _gradients(grad_y, x, weight, stride, padding, more):
    settings = (stride, padding, (1, 1), True, more, 1, (True, True, False))
    return torch.ops.aten.convolution_backward(grad_y, x, weight, None, *settings)[:2]


def _assert_gradients_right(grad_y, x, weight, stride=(2, 2), padding=(1, 1), more=(0, 0), expected=None):
    """3 times PyTorch's own error at most."""
    kernel = list(weight.shape[2:])
    grad_x = cpu_kernel.conv_transpose_grad_input(grad_y, weight, list(x.shape[2:]), stride, padding)
    grad_weight = cpu_kernel.conv_transpose_grad_weight(grad_y, x, kernel, stride, padding)
    expected = expected or _expected(_gradients, (grad_y, x, weight), (stride, padding, more), 3)
    for ours, truth, allowed in zip((grad_x, grad_weight), *expected, strict=True):
        assert ours.dtype is x.dtype and ours.shape == truth.shape
        assert _error(ours, truth) <= allowed, (x.shape, weight.shape, stride, padding, more)
    assert grad_x.is_contiguous(memory_format=torch.channels_last) and grad_weight.is_contiguous()
    last = cpu_kernel.conv_transpose_grad_weight(grad_y, x, kernel, stride, padding, True)
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, grad_weight)
    return grad_x, grad_weight


def _like_result(x, weight, stride, padding, more, **of):
    shape = F.conv_transpose2d(x.float(), weight.float(), None, stride, padding, more).shape
    return _normal(*shape, dtype=x.dtype, seed=3, **of)


@functools.cache
def _gradient_geometries(few):
    x, cases = _normal(2, 17, 5, 3), []
    for kernel in range(1, 7):
        weight = _normal(17, few, kernel, kernel, seed=2)
        for settings in _settings((5, 3), kernel):
            tensors = (_like_result(x, weight, *settings), x, weight)
            cases.append((tensors, settings, _expected(_gradients, tensors, settings, 3)))
    return cases


@pytest.mark.parametrize("few", (1, 3, 8))
def test_gradients_of_every_geometry(isa, few):
    for tensors, settings, expected in _gradient_geometries(few):
        _assert_gradients_right(*tensors, *settings, expected=expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("layout", LAYOUTS, ids=("planes", "last"))
def test_gradients_of_any_layout_and_dtype(isa, layout, dtype):
    for size, kernel, stride, padding, more in (
        ((9, 20), (4, 4), (2, 2), (1, 1), (0, 0)),
        ((3, 150), (5, 4), (2, 1), (2, 0), (1, 0)),  # more than one tile a row
        ((1, 37), (1, 6), (1, 2), (0, 5), (0, 1)),  # one-dimensional
        ((37, 1), (3, 1), (2, 1), (1, 0), (0, 0)),
    ):
        x = _normal(3, 32, *size, dtype=dtype, layout=layout)
        weight = _normal(32, 3, *kernel, dtype=dtype, layout=layout, seed=2)
        grad_y = _like_result(x, weight, stride, padding, more, layout=layout)
        _assert_gradients_right(grad_y, x, weight, stride, padding, more)
        _assert_gradients_right(grad_y[:, :, :, :1].expand(grad_y.shape), x, weight, stride, padding, more)
        wide = torch.cat((x, x), 1)
        _assert_gradients_right(grad_y, wide[:, 16:48], weight, stride, padding, more)


@pytest.mark.parametrize("batch", (1, 33))
def test_threads_do_not_change_a_bit_of_gradients(isa, batch):
    x, weight = _normal(batch, 24, 17, 13, layout=torch.channels_last), _normal(24, 3, 5, 5, seed=2)
    grad_y = _like_result(x, weight, (2, 2), (2, 2), (1, 1))
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(_assert_gradients_right(grad_y, x, weight, (2, 2), (2, 2), (1, 1)))
    for grad_x, grad_weight in results[1:]:
        assert torch.equal(grad_x, results[0][0]) and torch.equal(grad_weight, results[0][1])


def test_gradients_of_an_empty_batch(isa):
    x, weight, grad_y = _normal(0, 4, 5, 5), _normal(4, 3, 4, 4), _normal(0, 3, 10, 10)
    assert cpu_kernel.conv_transpose_grad_input(grad_y, weight, [5, 5], [2, 2], [1, 1]).shape == x.shape
    assert torch.equal(
        cpu_kernel.conv_transpose_grad_weight(grad_y, x, [4, 4], [2, 2], [1, 1]), torch.zeros_like(weight)
    )


def test_refuses_gradients_that_do_not_fit():
    x, weight, grad_y = _normal(2, 4, 5, 5), _normal(4, 3, 4, 4), _normal(2, 3, 12, 10)
    with pytest.raises(ValueError, match=r"grad_y: expected the gradient of a result .* got .*\(2, 3, 12, 10\)"):
        cpu_kernel.conv_transpose_grad_input(grad_y, weight, [5, 5], [2, 2], [1, 1])
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        cpu_kernel.conv_transpose_grad_weight(grad_y[:, :, :10].double(), x, [4, 4], [2, 2], [1, 1])
    with pytest.raises(ValueError, match=f"expected 1 to {FEW} output channels, got 9"):
        cpu_kernel.conv_transpose_grad_weight(_normal(2, 9, 10, 10), x, [4, 4], [2, 2], [1, 1])
