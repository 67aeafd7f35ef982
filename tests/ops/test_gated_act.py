"""gated_act, swiglu, geglu and bias_gelu beyond test_ops.py: names, packing, tails of the GELUs, what is kept."""

import math

import pytest
import torch
import torch.nn.functional as F
from alike import assert_near

from genai_fast import ops, use_backend
from genai_fast.backends import unavailable
from genai_fast.kernels.common.extension import cpu_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [backend for backend in ("reference", "cpu", "triton") if not unavailable(backend, DEVICE)]
NATIVE = [backend for backend in BACKENDS if backend != "reference"]


def _normal(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _gradients(call, *tensors):
    """The result and the gradients of a fixed weighted sum of it."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, _normal(*y.shape, seed=7, dtype=y.dtype))]


def _assert_alike(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert_near(a, b)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 4, 8)], ids=str)
@pytest.mark.parametrize(
    ("call", "gate"),
    [
        (ops.swiglu, F.silu),
        (ops.geglu, F.gelu),
        (lambda *a: ops.geglu(*a, approximate="tanh"), lambda z: F.gelu(z, approximate="tanh")),
        (lambda *a: ops.gated_act(*a, activation="sigmoid"), torch.sigmoid),
    ],
    ids=("swiglu", "geglu", "geglu_tanh", "glu"),
)
def test_names(backend, call, gate, shape):
    a, b, bias = _normal(*shape), _normal(*shape, seed=2), _normal(2 * shape[-1], seed=3)
    _assert_alike(_gradients(call, a, b), _gradients(lambda a, b: gate(a) * b, a, b))

    def plain(x, bias):
        first, second = (x + bias).chunk(2, -1)
        return gate(first) * second

    x = torch.cat((a, b), -1)
    _assert_alike(_gradients(lambda x, bias: call(x, None, bias), x, bias), _gradients(plain, x, bias))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 4, 8), (0, 3, 4)], ids=str)
def test_bias_gelu(backend, shape, approximate):
    x, bias = 2.0 * _normal(*shape), _normal(shape[-1], seed=3)
    got = _gradients(lambda x, bias: ops.bias_gelu(x, bias, approximate), x, bias)
    _assert_alike(got, _gradients(lambda x, bias: F.gelu(x + bias, approximate=approximate), x, bias))
    unbiased = _gradients(lambda x: ops.bias_gelu(x, None, approximate), x)
    _assert_alike(unbiased, _gradients(lambda x: F.gelu(x, approximate=approximate), x))
    if len(shape) > 2:  # rows that do not lie one after another
        turned = x.transpose(0, 1).contiguous().transpose(0, 1)
        y = ops.bias_gelu(turned, bias, approximate)
        assert y.is_contiguous() and torch.equal(y, got[0])


@pytest.mark.skipif(DEVICE == "cuda", reason="about CPU tensors")
def test_gelu_alone_is_left_to_torch_where_that_is_faster():
    x = _normal(3, 5, 7).transpose(0, 1)
    y = ops.bias_gelu(x)
    assert y.is_contiguous() and torch.equal(y, F.gelu(x.contiguous()))
    (g,) = torch.autograd.grad(ops.bias_gelu(x.requires_grad_()).square().sum(), x, create_graph=True)
    assert g.requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: ops.bias_gelu(x, x[0, :5]), ValueError, r"bias_gelu: bias: expected shape \(6,\).*got \(5,\)"),
        (lambda x: ops.bias_gelu(x, x[0].double()), TypeError, r"bias_gelu: bias: expected torch\.float32"),
        (lambda x: ops.bias_gelu(x, approximate="erf"), ValueError, r"bias_gelu: approximate: expected one of 'none'"),
        (lambda x: ops.bias_gelu(x[0, 0]), ValueError, r"bias_gelu: x: expected \[\.\.\., D\], got shape \(\)"),
        (lambda x: ops.bias_gelu(x.int()), TypeError, r"bias_gelu: x: expected a floating-point tensor"),
        (lambda x: ops.geglu(x, approximate="erf"), ValueError, r"geglu: approximate: expected one of 'none', 'tanh'"),
        (lambda x: ops.geglu(x, x[:2]), ValueError, r"geglu: up: expected shape \(4, 6\)"),
        (lambda x: ops.swiglu(x[:, :5]), ValueError, r"swiglu: x: expected \[\.\.\., 2 D\]"),
        (lambda x: ops.swiglu(x, bias=x[0, :3]), ValueError, r"swiglu: bias: expected shape \(6,\)"),
    ],
)
def test_bad_input_names_the_function_that_was_called(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(_normal(4, 6))


@pytest.mark.parametrize("activation", ["silu", "gelu", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_is_the_pair_to_the_bit(backend, activation, dtype):
    x, bias = _normal(37, 2 * 70, dtype=dtype), _normal(2 * 70, seed=3)
    packed = _gradients(lambda x, bias: ops.gated_act(x, None, bias, activation), x, bias)
    pair = _gradients(lambda a, b, bias: ops.gated_act(a, b, bias, activation), *x.chunk(2, -1), bias)
    for got, expected in zip(packed, (pair[0], torch.cat(pair[1:3], -1), pair[3]), strict=True):
        assert torch.equal(got, expected)


def test_backward_keeps_its_inputs_alone():
    x, bias = _normal(32, 64).requires_grad_(), _normal(64, seed=2)
    for call, given in (
        (lambda: ops.swiglu(x), {x.data_ptr()}),
        (lambda: ops.geglu(x, x, torch.cat((bias, bias))), {x.data_ptr()}),
        (lambda: ops.bias_gelu(x, bias), {x.data_ptr()}),
    ):
        kept = set()

        def pack(t, kept=kept):
            if t.numel() > 128:  # biases apart
                kept.add(t.data_ptr())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            call()
        assert kept == given


def _exact(z, approximate, of):
    """GELU or its derivative in float64, without the cancellation of 1 + erf."""
    z = z.double()
    if approximate == "none":
        share = 0.5 * torch.erfc(-z * math.sqrt(0.5))
        return z * share if of == "value" else share + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    root = math.sqrt(8 / math.pi)
    s = torch.sigmoid(root * (z + 0.044715 * z**3))
    other = torch.sigmoid(-root * (z + 0.044715 * z**3))
    return z * s if of == "value" else s * (1 + z * other * root * (1 + 0.134145 * z * z))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("of", ["value", "derivative"])
@pytest.mark.parametrize(("approximate", "lowest"), [("none", -12.5), ("tanh", -8.0)])
def test_gelus_are_relatively_accurate_in_the_tail(backend, approximate, of, lowest):
    """Relatively; the derivatives' zeros near -0.75 are left to the next test."""
    z = torch.cat((torch.linspace(lowest, -1.5, 20001), torch.linspace(-1e-3, 12.0, 5001))).to(DEVICE)
    leaf = z[None].clone().requires_grad_()
    with use_backend(backend):
        y = ops.bias_gelu(leaf, None, approximate)
        got = y.detach()[0] if of == "value" else torch.autograd.grad(y.sum(), leaf)[0][0]
    exact = _exact(z, approximate, of)
    error = ((got.double() - exact) / exact).abs().nan_to_num(0.0)  # 0 / 0 at 0
    assert float(error[z > -5.0].max()) < (1e-6 if approximate == "none" else 3e-6)
    fused_multiply = backend == "cpu" and cpu_kernels()[1] in ("avx2", "avx512")  # neither portably nor interpreted
    assert float(error.max()) < (1e-5 if approximate == "tanh" else 1e-6 if fused_multiply else 5e-6)


@pytest.mark.parametrize("backend", NATIVE)
def test_gelus_at_infinity(backend):
    """As F.gelu in float64: in float32 its vectorised loop gives NaN at +inf, where the loop's rest gives inf."""
    z = torch.tensor([[float("inf"), -float("inf"), float("nan"), 3e38, -3e38]], device=DEVICE)
    for approximate in ("none", "tanh"):
        leaf = z.clone().requires_grad_()
        with use_backend(backend):
            y = ops.bias_gelu(leaf, None, approximate)
            (slope,) = torch.autograd.grad(y.sum(), leaf)
        expected = torch.tensor([[float("inf"), float("nan"), float("nan"), 3e38, 0.0]], device=DEVICE)
        assert torch.equal(y.nan_to_num(-1.0, 1.0), expected.nan_to_num(-1.0, 1.0))
        assert torch.equal(slope.nan_to_num(-1.0), torch.tensor([[-1.0, -1.0, -1.0, 1.0, 0.0]], device=DEVICE))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelus_and_their_derivatives_everywhere(backend, approximate):
    z = torch.linspace(-15.0, 15.0, 40001).to(DEVICE)
    leaf = z[None].clone().requires_grad_()
    with use_backend(backend):
        y = ops.bias_gelu(leaf, None, approximate)
        (slope,) = torch.autograd.grad(y.sum(), leaf)
    y = y.detach()
    assert float((y[0].double() - _exact(z, approximate, "value")).abs().max()) < 1.5e-6
    assert float((slope[0].double() - _exact(z, approximate, "derivative")).abs().max()) < 3e-7
    assert float(((y - y.flip(1))[0] - z).abs().max()) < 3e-6  # gelu(z) - gelu(-z) = z


@pytest.mark.parametrize("backend", NATIVE)
def test_silu_and_sigmoid_vanish_at_minus_infinity(backend):
    """And not only nearly: their product with a large number is 0."""
    z = torch.tensor([[-3e38, -1e20, -200.0, -float("inf")]], device=DEVICE)
    with use_backend(backend):
        assert torch.equal(ops.bias_act(z, None, "sigmoid"), torch.zeros_like(z))
        y = ops.bias_act(z, None, "silu")
        assert float(y[0, :3].abs().max()) == 0.0 and bool(y[0, 3].isnan())


def test_under_autocast_gate_and_up_meet_in_the_wider_dtype():
    a, b = _normal(4, 6), _normal(4, 6, seed=2, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = ops.swiglu(a, b)
    assert torch.equal(got, ops.swiglu(a, b.float()))


@pytest.mark.parametrize("backend", NATIVE)
def test_raw_operators_refuse_what_would_read_foreign_memory(backend):
    library = torch.ops.genai_fast
    x, up, bias, settings = _normal(4, 8), _normal(4, 8), _normal(8), ("silu", 1.0, 1.0, backend)
    for call in (
        lambda: library.gated_act(x[0], None, None, *settings),
        lambda: library.gated_act(x[:, :7], None, None, *settings),
        lambda: library.gated_act(x, up[:3], None, *settings),
        lambda: library.gated_act(x, up.half(), None, *settings),
        lambda: library.gated_act(x, up, bias, *settings),
        lambda: library.gated_act(x, None, bias[:6], *settings),
        lambda: library.gated_act(x, None, bias.half(), *settings),
        lambda: library.gated_act_backward(x, x, None, bias, True, *settings),
        lambda: library.gated_act_backward(x[:3, :4], x, None, bias, True, *settings),
        lambda: library.gated_act_backward(x[:, :4].half(), x, None, bias, True, *settings),
    ):
        with pytest.raises(ValueError, match="genai_fast: expected"):
            call()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU's memory and speed")
def test_more_than_2_31_elements():
    x = torch.randn(2**20 + 3, 2 * 1024, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(ops.swiglu(x)[-99:], ops.swiglu(x[-99:]))
