"""bias_act and act_dropout beyond test_ops.py: what they keep for backward, and the mask that they draw twice."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from genai_fast import ops, use_backend
from genai_fast.backends import unavailable
from genai_fast.kernels.common import philox
from genai_fast.kernels.common.activations import ACTIVATIONS, activate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [backend for backend in ("reference", "cpu", "triton") if not unavailable(backend, DEVICE)]
SAVING = [(name, False) for name in ACTIVATIONS] + [(name, True) for name in ("leaky_relu", "relu", "tanh", "sigmoid")]


def _normal(*shape, dtype=torch.float32, grad=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x.to(DEVICE, dtype).requires_grad_(grad)


def _saved_bytes(call):
    """Memory that backward of call() holds, seeds and parameters apart."""
    kept = {}

    def pack(x):
        if x.numel() > 64:
            kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = call()
    return y, kept


@pytest.mark.parametrize(("activation", "save_output"), SAVING)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.filterwarnings("ignore::genai_fast.FallbackWarning")
def test_second_derivatives_of_bias_act_for_both_ways_of_saving(activation, save_output, with_bias):
    x, bias = _normal(3, 4, 3, dtype=torch.float64, grad=True), _normal(4, dtype=torch.float64, grad=True)

    def function(x, bias):
        y = ops.bias_act(x, bias if with_bias else None, activation, 0.3, save_output=save_output)
        return y * y * y  # so that what flows into backward depends on x too

    assert torch.autograd.gradcheck(lambda *a: function(*a), (x, bias))
    assert torch.autograd.gradgradcheck(lambda *a: function(*a), (x, bias))


@pytest.mark.parametrize(("activation", "save_output"), SAVING)
@pytest.mark.filterwarnings("ignore::genai_fast.FallbackWarning")
def test_second_derivatives_of_act_dropout_for_both_ways_of_saving(activation, save_output):
    x = _normal(3, 4, 3, dtype=torch.float64, grad=True)

    def function(x):
        return ops.act_dropout(x, 0.3, True, activation, 0.3, seed=5, save_output=save_output) ** 3

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("name", ["elu", "relu6", "selu", "hardswish", "softplus", "mish"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kinks_and_infinities_are_pytorchs(name, backend):
    infinite = [math.inf, -math.inf, math.nan]
    values = [0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, 2.9, -3.1, 6.0, 5.9, 20.0, 20.1, 80.0, -80.0, *infinite]
    x = torch.tensor([values] * 16, device=DEVICE, requires_grad=True)

    def derivatives(function):
        y = function(x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        second = torch.autograd.grad(first.sum(), x)[0] if first.requires_grad else torch.zeros_like(x)
        return y, first, second

    with use_backend(backend):
        y, first, second = derivatives(lambda z: ops.bias_act(z, None, name))
        (alone,) = torch.autograd.grad(ops.bias_act(x, None, name).sum(), x)
    expected = derivatives(getattr(F, name))
    rest = torch.tensor(values, device=DEVICE).isfinite()
    for found, torchs in (
        (y, expected[0]),
        (first[:, rest], expected[1][:, rest]),
        (second[:, rest], expected[2][:, rest]),
    ):
        torch.testing.assert_close(found, torchs, rtol=2e-6, atol=1e-37, equal_nan=True)
    # Of NaN PyTorch's own loops differ between the lanes of a vector and the rest.
    torch.testing.assert_close(alone[:, :-1], expected[1][:, :-1], rtol=2e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("name", ["elu", "softplus"])
def test_the_parameter_is_torchs_unless_it_is_given(name):
    x, function = _normal(7, 8), getattr(F, name)
    torch.testing.assert_close(ops.bias_act(x, None, name), function(x))
    torch.testing.assert_close(ops.bias_act(x, None, name, 0.3), function(x, 0.3))
    torch.testing.assert_close(ops.bias_act(x, None, "leaky_relu"), F.leaky_relu(x, 0.2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save_output", [False, True])
def test_gradient_penalty_in_float32(backend, save_output):
    """A WGAN-GP step through two layers: the kernels' first derivatives, plain PyTorch's second ones."""
    x, weight, bias = _normal(6, 8, grad=True), _normal(8, 8), _normal(8, grad=True)

    def penalty(first, second):
        hidden = first(F.linear(x, weight))
        (g,) = torch.autograd.grad(second(F.linear(hidden, weight)).square().sum(), x, create_graph=True)
        return torch.autograd.grad((g.norm(dim=1) - 1).square().mean(), (x, bias))

    with use_backend(backend):
        saved = {"save_output": save_output}
        got = penalty(lambda z: ops.bias_act(z, bias, **saved), lambda z: ops.act_dropout(z, 0.3, seed=3, **saved))
        keep = ops.act_dropout(torch.ones(6, 8, device=DEVICE), 0.3, activation="none", seed=3)
    expected = penalty(lambda z: F.leaky_relu(z + bias, 0.2), lambda z: F.leaky_relu(z, 0.2) * keep)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("op", ["bias_act", "act_dropout"])
def test_a_saved_output_may_not_change(op, activation):
    h = _normal(8, 16, grad=True)
    y = getattr(ops, op)(h * 1.0, activation=activation, save_output=True)
    y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("op", "activation", "save_output", "kept"),
    [
        ("bias_act", "leaky_relu", False, "x"),
        ("bias_act", "leaky_relu", True, "y"),
        ("bias_act", "relu", False, "y"),
        ("bias_act", "tanh", False, "y"),
        ("bias_act", "sigmoid", False, "y"),
        ("bias_act", "silu", False, "x"),
        ("bias_act", "none", False, None),
        ("act_dropout", "leaky_relu", False, "x"),
        ("act_dropout", "leaky_relu", True, "y"),
        ("act_dropout", "relu", False, "x"),
        ("act_dropout", "tanh", False, "x"),
        ("act_dropout", "tanh", True, "y"),
        ("act_dropout", "none", False, None),
    ],
)
def test_what_backward_keeps(op, activation, save_output, kept):
    x = _normal(32, 16, grad=True)
    y, saved = _saved_bytes(lambda: getattr(ops, op)(x, activation=activation, save_output=save_output))
    expected = {"x": x, "y": y, None: None}[kept]
    assert set(saved) == (set() if expected is None else {expected.data_ptr()})


@pytest.mark.parametrize("op", ["bias_act", "act_dropout"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(op, backend):
    """Channels-last stays, also through backward; what has holes or other orders becomes row-major."""
    x = _normal(3, 5, 4, 6)
    layouts = {
        "contiguous": (x, x.stride()),
        "channels_last": (x.to(memory_format=torch.channels_last), (120, 1, 30, 5)),
        "strided": (_normal(3, 9, 4, 6)[:, 2:7], x.stride()),
        "transposed": (x.transpose(2, 3), (120, 24, 4, 1)),
    }
    with use_backend(backend):
        for name, (given, strides) in layouts.items():
            for gradient_format in (torch.contiguous_format, torch.channels_last):
                leaf = given.detach().requires_grad_()
                y = getattr(ops, op)(leaf, activation="none", **({} if op == "bias_act" else {"seed": 1}))
                assert y.stride() == strides, name
                upstream = torch.ones_like(y).contiguous(memory_format=gradient_format)
                (g,) = torch.autograd.grad(y, leaf, upstream)
                scale = 1.0 if op == "bias_act" else 2.0
                assert torch.equal(g, scale * (y != 0).to(g.dtype)), name


@pytest.mark.parametrize("save_output", [False, True])
def test_channel_sums_are_those_of_float64(save_output):
    """Long sums with cancellation, in both layouts and for few channels."""
    for shape in ((64, 3, 40, 40), (16, 48, 31, 33)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = _normal(*shape).contiguous(memory_format=memory_format).requires_grad_()
            bias, upstream = _normal(shape[1], grad=True), torch.randn_like(x)
            y = ops.bias_act(x, bias, save_output=save_output)
            (got,) = torch.autograd.grad(y, bias, upstream)
            exact = upstream.double() * torch.where(y > 0, 1.0, 0.2).double()
            error = (got.double() - exact.sum((0, 2, 3))).abs() / exact.abs().sum((0, 2, 3))
            assert float(error.max()) < 1e-7


def _kept(backend, shape, p, seed, offset=0, memory_format=torch.contiguous_format, dtype=torch.float32):
    x = torch.ones(shape, device=DEVICE, dtype=dtype).contiguous(memory_format=memory_format)
    with use_backend(backend):
        return ops.act_dropout(x, p, seed=seed, offset=offset) != 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.25, 0.3, 0.5, 0.75, 1 - 2**-32, 1.0])
@pytest.mark.parametrize("offset", [0, 1, 7, 2**34 - 100])
def test_the_mask_is_the_stream_below_the_threshold(backend, p, offset):
    for count, seed in ((1, 3), (1029, -5), (5000, 2**62 + 1)):
        words = philox.words(count, torch.tensor(seed), offset)
        assert torch.equal(_kept(backend, (count,), p, seed, offset).cpu(), words >= round(p * 2**32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_go_by_the_order_of_memory(backend):
    shape = (3, 5, 7, 9)
    plain = _kept(backend, shape, 0.4, 9)
    last = _kept(backend, shape, 0.4, 9, memory_format=torch.channels_last)
    assert torch.equal(last.permute(0, 2, 3, 1).flatten(), plain.flatten())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_offset_continues_the_mask_in_every_dtype(backend, dtype):
    whole = _kept(backend, (6, 700), 0.3, 11, dtype=dtype)
    parts = [
        _kept(backend, (stop - start, 700), 0.3, 11, 700 * start, dtype=dtype)
        for start, stop in itertools.pairwise((0, 1, 3, 6))
    ]
    assert torch.equal(whole, torch.cat(parts))
    shifted = _kept(backend, (6 * 700 - 5,), 0.3, 11, 5, dtype=dtype)
    assert torch.equal(whole.flatten()[5:], shifted)


@pytest.mark.parametrize("p", [0.02, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_share_kept(p, seed):
    count = 2**20
    kept = _kept("cpu" if "cpu" in BACKENDS else BACKENDS[-1], (count,), p, seed).double()
    sigma = math.sqrt(p * (1 - p) / count)
    assert abs(float(kept.mean()) - (1 - p)) < 5 * sigma
    lanes = kept.view(-1, 4) - (1 - p)  # nor may neighbours know of each other
    for a, b in itertools.combinations(range(4), 2):
        assert abs(float((lanes[:, a] * lanes[:, b]).mean())) < 5 * p * (1 - p) / math.sqrt(count / 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("activation", "save_output"), SAVING)
@pytest.mark.parametrize("offset", [0, 3])
def test_backward_drops_what_forward_dropped(backend, activation, save_output, offset):
    x = _normal(4, 5, 6, 7).abs().add(0.1).to(memory_format=torch.channels_last).requires_grad_()
    with use_backend(backend):
        y = ops.act_dropout(x, 0.4, activation=activation, seed=8, offset=offset, save_output=save_output)
        (g,) = torch.autograd.grad(y, x, torch.ones_like(y).contiguous())
    assert torch.equal(g != 0, y != 0)
    assert 0 < int((y != 0).sum()) < y.numel()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_and_backends_agree_bitwise(count):
    if "cpu" not in BACKENDS:
        pytest.skip("about CPU tensors")
    x, threads = _normal(7, 33, 29, 31), torch.get_num_threads()
    expected = F.leaky_relu(x, 0.2) * torch.where(_kept("reference", x.shape, 0.25, 4), 4.0 / 3.0, 0.0)
    try:
        torch.set_num_threads(count)
        with use_backend("cpu"):
            y = ops.act_dropout(x, 0.25, seed=4)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(y != 0, expected != 0)
    torch.testing.assert_close(y, expected)


def test_zero_is_a_value_like_others():
    """Kept zeros have a gradient although y is 0, from y too."""
    x = torch.zeros(64, device=DEVICE, requires_grad=True)
    for save_output in (False, True):
        y = ops.act_dropout(x, 0.5, seed=2, save_output=save_output)
        (g,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(g, torch.where(_kept("reference", (64,), 0.5, 2), 0.4, 0.0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_eval_and_p_0_are_the_activation_alone(activation):
    x = _normal(5, 6, 7)
    expected = activate(x, activation, None)
    state = torch.get_rng_state()
    for p, training in ((0.5, False), (0.0, True), (1.0, False)):
        torch.testing.assert_close(ops.act_dropout(x, p, training, activation), expected, rtol=2e-6, atol=1e-6)
    assert torch.equal(state, torch.get_rng_state())  # and draw nothing


def test_manual_seed_makes_draws_reproducible():
    x = _normal(4, 99)
    torch.manual_seed(3)
    first, second = ops.act_dropout(x), ops.act_dropout(x)
    torch.manual_seed(3)
    assert torch.equal(first, ops.act_dropout(x))
    assert not torch.equal(first, second)


def test_compiled_draws_are_eager_draws():
    torch._dynamo.reset()
    x = _normal(4, 99, grad=True)

    def twice(x):
        return ops.act_dropout(x, 0.3), ops.act_dropout(x, 0.3)

    def run(function):
        torch.manual_seed(3)
        a, b = function(x)
        return a, b, *torch.autograd.grad((a * b).sum(), x)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    results = run(compiled)
    assert not torch.equal(results[0], results[1])
    for a, b in zip(results, run(twice), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(compiled(x)[0], results[0])  # each call draws anew


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_raw_operators_refuse_what_would_read_foreign_memory(backend):
    library, seed = torch.ops.genai_fast, torch.tensor(1, device=DEVICE)
    x, short, bias = torch.zeros(4, 8, device=DEVICE), torch.zeros(4, 7, device=DEVICE), torch.zeros(8, device=DEVICE)
    for call in (
        lambda: library.bias_act(x, bias[:7], None, "relu", 0.0, backend),
        lambda: library.bias_act(x, bias.bfloat16(), None, "relu", 0.0, backend),
        lambda: library.bias_act(x, bias, bias[:7], "prelu", 0.0, backend),
        lambda: library.bias_act(x, bias, None, "prelu", 0.0, backend),
        lambda: library.bias_act(x, bias, bias, "relu", 0.0, backend),
        lambda: library.bias_act_backward(short, x, bias, None, False, True, "silu", 0.0, backend),
        lambda: library.bias_act_backward(x.bfloat16(), x, bias, None, False, True, "silu", 0.0, backend),
        lambda: library.act_dropout(x, seed.int(), 0.5, 0, "relu", 0.0, backend),
        lambda: library.act_dropout(x, seed.expand(2), 0.5, 0, "relu", 0.0, backend),
        lambda: library.act_dropout_backward(short, x, seed, 0.5, 0, False, "silu", 0.0, backend),
        lambda: library.act_dropout_backward(x.bfloat16(), x, seed, 0.5, 0, False, "silu", 0.0, backend),
    ):
        with pytest.raises(ValueError, match="genai_fast: expected"):
            call()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU's memory and speed")
def test_more_than_2_31_elements():
    count, tail = 2**31 + 12345 * 8, 4096 * 8
    x = torch.randn(count, device=DEVICE, dtype=torch.bfloat16)
    y = ops.act_dropout(x, 0.25, seed=4)
    assert torch.equal(y[-tail:], ops.act_dropout(x[-tail:], 0.25, seed=4, offset=count - tail))
    assert torch.equal(ops.bias_act(x[None])[0, -tail:], ops.bias_act(x[None, -tail:])[0])
    rows, bias = x.view(-1, 8), torch.randn(8, device=DEVICE)
    assert torch.equal(ops.bias_act(rows, bias)[-99:], ops.bias_act(rows[-99:], bias))
