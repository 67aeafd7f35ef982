"""Transposed convolutions beyond the cases of the registry: every geometry, statistics, and which backend serves."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F

from genai_fast import FallbackWarning, ops, use_backend
from genai_fast.backends import unavailable
from genai_fast.kernels.conv_transpose.shapes import not_served
from genai_fast.ops.conv_transpose import serves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in ("reference", "triton") if not unavailable(name, DEVICE)]
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason=unavailable("triton", DEVICE) or "triton runs")

PLANE = (4, 3)
# (kernel, stride, padding, output_padding) along one dimension.
LINES = [
    (k, s, p, more)
    for k, s, p in itertools.product(range(1, 7), (1, 2), range(3))
    for more in range(s)
    if (min(PLANE) - 1) * s - 2 * p + k + more > 0
]
# Each line meets another one in the other dimension.
PLANES = [(line, LINES[(7 * i + 3) % len(LINES)]) for i, line in enumerate(LINES)]


@pytest.fixture(autouse=True)
def no_tf32():
    """Which reads 10 bits; the numerics gate has it on a GPU, where PyTorch's default allows it."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    yield
    convolutions.fp32_precision = before


def _normal(*shape, dtype=torch.float32, scale=1.0, grad=True):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype).requires_grad_(grad)


def _geometry(lines):
    """Kernel, and the keyword arguments of a plane's two lines."""
    kernel, stride, padding, output_padding = zip(*lines, strict=True)
    return kernel, dict(stride=stride, padding=padding, output_padding=output_padding)


def _assert_close(got, truth, tolerance=3e-6):
    """Relative to the largest number of the truth."""
    truth = truth.detach()
    scale = float(truth.abs().max()) or 1.0
    torch.testing.assert_close(got.double() / scale, truth / scale, rtol=0.0, atol=tolerance)


def _results(function, x, weight, bias, settings):
    """y, and the gradients of a fixed weighted sum of it."""
    y = function(x, weight, bias, **settings)
    upstream = _normal(*y.shape, grad=False).to(y.dtype)
    return [y, *torch.autograd.grad(y, (x, weight, bias), upstream)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [2, 9], ids=["few", "many"])
@pytest.mark.parametrize("lines", PLANES, ids=lambda lines: "-".join("k{}s{}p{}o{}".format(*line) for line in lines))
def test_every_geometry(lines, channels, backend):
    kernel, settings = _geometry(lines)
    inputs = _normal(2, 3, *PLANE), _normal(3, channels, *kernel, scale=0.3), _normal(channels)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    with use_backend(backend):
        got = _results(ops.conv_transpose2d, *inputs, settings)
    for mine, truth in zip(got, _results(F.conv_transpose2d, *wide, settings), strict=True):
        assert mine.shape == truth.shape
        _assert_close(mine, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_lies_channels_last_and_the_weights_gradient_as_the_weight(backend):
    with use_backend(backend):
        for layout in (torch.contiguous_format, torch.channels_last):
            x, weight = (_normal(*shape, grad=False) for shape in ((2, 6, 3, 3), (6, 9, 4, 4)))
            x, weight = (t.contiguous(memory_format=layout).requires_grad_() for t in (x, weight))
            y = ops.conv_transpose2d(x, weight, None, 2, 1)
            assert y.is_contiguous(memory_format=torch.channels_last)
            (gradient,) = torch.autograd.grad(y.sum(), weight)
            assert gradient.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("shape", [(3, 5, 5, 4), (40, 3, 2, 2), (70, 3, 1, 1)], ids=str)
def test_statistics_are_those_of_the_result(shape, kernel, backend):
    x, weight, bias = _normal(*shape), _normal(shape[1], 20, kernel, kernel), _normal(20)
    library, running = torch.ops.genai_fast, [torch.full((20,), v, device=DEVICE) for v in (0.5, 2.0)]
    geometry = ([2, 2], [1, 1], [1, 1])
    expected_running = [r.clone() for r in running]
    y, *got = library.conv_transpose_statistics(x, weight, bias, *running, 0.3, 1e-3, *geometry, backend)
    assert torch.equal(y, library.conv_transpose(x, weight, bias, *geometry, "none", 0.0, backend))
    expected = library.batch_norm_statistics(y, *expected_running, 0.3, 1e-3, "reference")
    for mine, theirs in zip([*got, *running], [*expected, *expected_running], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("groups", [1, 300, 17000])
def test_many_moments_are_merged(groups):
    """Counts, means and squared deviations of groups of different sizes, far from 0."""
    from genai_fast.kernels.common.moments_triton import combine_moments

    sizes = torch.arange(groups) % 3  # some groups are empty
    sizes[0] = 2
    values = [torch.randn(int(n), 5) + 100.0 for n in sizes]
    partial = torch.zeros(3, groups, 5)
    for i, group in enumerate(values):
        if len(group):
            mean = group.mean(0)
            partial[:, i] = torch.stack((torch.full((5,), float(len(group))), mean, ((group - mean) ** 2).sum(0)))
    everything = torch.cat(values).double()
    got = combine_moments(partial.to(DEVICE), None, None, len(everything), 0.0, 1e-5)
    squares = everything.var(0, correction=0) * len(everything)
    expected = (everything.mean(0), squares, torch.rsqrt(squares / len(everything) + 1e-5))
    for mine, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double().cpu(), truth, rtol=1e-5, atol=1e-6)


def test_upsampling_and_convolving_is_one_transposed_convolution():
    """Exactly, in float64: not only to the tolerance of the numerics gate."""
    x, weight = _normal(2, 3, 3, 4, dtype=torch.float64), _normal(5, 3, 3, 3, dtype=torch.float64)
    with use_backend("reference"):
        got = ops.upsample_conv2d(x, weight)
    truth = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    torch.testing.assert_close(got, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bias_before_a_batch_norm_has_no_gradient(backend):
    x, weight, bias = _normal(3, 4, 3, 3), _normal(4, 9, 4, 4), _normal(9)
    with use_backend(backend):
        y = ops.conv_transpose2d_batch_norm_act(x, weight, bias, stride=2, padding=1)
        shifted = ops.conv_transpose2d_batch_norm_act(x, weight, bias + 1.0, stride=2, padding=1)
    gradient = torch.autograd.grad((y * _normal(*y.shape, grad=False)).sum(), bias)[0]
    assert gradient.abs().max() < 1e-4
    torch.testing.assert_close(y, shifted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["odd", "second_order"])
def test_second_derivative_of_a_block(case, backend):
    """The gradient penalty through the op whose statistics come out of the convolution."""
    from genai_fast.kernels.common.spec import Tensors
    from genai_fast.registry import OPS

    op = OPS["conv_transpose2d_batch_norm_act"]
    (found,) = (c for c in op.cases if c.name == case)
    given = found.inputs(Tensors(device=DEVICE))

    def penalty(function, inputs):
        y = function(**inputs)
        leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        upstream = torch.linspace(-1, 2, y.numel()).view(y.shape).to(y)
        first = torch.autograd.grad((y * upstream).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves, materialize_grads=True)

    wide = {
        k: v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
        for k, v in given.items()
    }
    with use_backend(backend):
        got = penalty(ops.conv_transpose2d_batch_norm_act, given)
    for mine, truth in zip(got, penalty(op.reference, wide), strict=True):
        _assert_close(mine, truth, 1e-4)


def test_autocast_casts_as_for_pytorchs_convolutions():
    x, weight, bias = _normal(2, 3, 4, 4, dtype=torch.bfloat16), _normal(3, 9, 4, 4), _normal(9)
    with pytest.raises(TypeError, match=r"weight.*expected torch\.bfloat16.*autocast"):
        ops.conv_transpose2d(x, weight, bias, 2, 1)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = ops.conv_transpose2d(x, weight, bias, 2, 1)
        assert y.dtype == F.conv_transpose2d(x, weight, bias, 2, 1).dtype == torch.bfloat16
        assert ops.upsample_conv2d(x, _normal(9, 3, 3, 3)).dtype is torch.bfloat16
    gradients = torch.autograd.grad(y.float().sum(), (x, weight, bias))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]


@needs_triton
@pytest.mark.parametrize(("change", "reason"), [(dict(stride=3), "stride"), (dict(kernel=7), "kernel")], ids=str)
def test_what_no_kernel_serves_goes_to_pytorch(change, reason):
    kernel = change.get("kernel", 4)
    settings = dict(stride=change.get("stride", 2))
    x, weight, bias = _normal(2, 3, 4, 4), _normal(3, 9, kernel, kernel), _normal(9)
    with use_backend("triton"):
        assert reason in serves(x, weight, **settings)
        assert serves(x, _normal(3, 9, 4, 4), 2) == ""
        with pytest.raises(RuntimeError, match=f"'triton' was asked for, but {reason}.*larger.*remedy"):
            ops.conv_transpose2d(x, weight, bias, **settings)
    wide = [v.detach().double().requires_grad_() for v in (x, weight, bias)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)  # planned, so there is nothing to warn of
        got = _results(ops.conv_transpose2d, x, weight, bias, settings)
    for mine, truth in zip(got, _results(F.conv_transpose2d, *wide, settings), strict=True):
        _assert_close(mine, truth)


def test_serves_says_which_backend_does_not():
    x, weight = _normal(2, 3, 4, 4), _normal(3, 9, 4, 4)
    with use_backend("reference"):
        assert "use_backend" in serves(x, weight, 2)
    if DEVICE == "cpu":
        assert "9 output channels are more than 8" in serves(x, weight, 2)
        assert serves(x, weight[:, :3], 2) == ""


@needs_triton
def test_raw_operators_refuse_what_would_read_foreign_memory():
    library, geometry = torch.ops.genai_fast, ([2, 2], [1, 1])
    x, weight, grad_y = (_normal(*shape, grad=False) for shape in ((2, 6, 3, 3), (6, 9, 4, 4), (2, 9, 6, 6)))
    forward = (*geometry, [0, 0], "none", 0.0, "triton")
    for call in (
        lambda: library.conv_transpose(x, weight[:5], None, *forward),
        lambda: library.conv_transpose(x, weight.bfloat16(), None, *forward),
        lambda: library.conv_transpose(x, weight, _normal(8, grad=False), *forward),
        lambda: library.conv_transpose_grad_input(grad_y[:, :8], weight, [3, 3], *geometry, "triton"),
        lambda: library.conv_transpose_grad_weight(grad_y[:1], x, [4, 4], *geometry, True, "triton"),
        lambda: library.conv_transpose_grad_weight(grad_y, x.half(), [4, 4], *geometry, True, "triton"),
        lambda: library.conv_transpose_statistics(x[:0], weight, None, None, None, 0.1, 1e-5, *forward[:3], "triton"),
    ):
        with pytest.raises(ValueError, match="genai_fast: expected"):
            call()


@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 7, 16])
def test_one_by_one_with_a_stride_over_few_channels(channels, stride):
    """Where oneDNN overruns a buffer in channels last: eager PyTorch is wrong there, or hangs, on some processors."""
    x, weight, bias = _normal(2, channels, 8, 9), _normal(5, channels, 1, 1), _normal(5)
    turned = _normal(2, 5, 4, 3), _normal(5, channels, 1, 1), _normal(channels)
    for mine, theirs, inputs, more in (
        (ops.conv2d, F.conv2d, (x, weight, bias), {}),
        (ops.conv_transpose2d, F.conv_transpose2d, turned, dict(output_padding=tuple(s - 1 for s in stride))),
    ):
        last = [t.detach().to(memory_format=torch.channels_last) if t.dim() == 4 else t.detach() for t in inputs]
        last = [t.requires_grad_() for t in last]
        wide = [t.detach().double().requires_grad_() for t in inputs]
        settings = dict(stride=stride, **more)
        with use_backend("reference"):
            got = _results(mine, *last, settings)
        for a, truth in zip(got, _results(theirs, *wide, settings), strict=True):
            _assert_close(a, truth)


def test_a_plane_that_is_cropped_to_a_few_pixels_is_left_to_torch():
    """Numbers within a tile, which holds many samples then, must fit 32 bits."""
    assert "crops" in not_served((1, 16, 1024, 1024), (1, 8, 2, 2), (3, 3), (1, 1))
    assert not not_served((1, 16, 1024, 1024), (1, 8, 1024, 1024), (3, 3), (1, 1))
