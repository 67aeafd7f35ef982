"""What ops take and refuse: numbers of any kind, flags, layouts of memory, other devices, one tensor twice."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genai_fast import layers, ops
from genai_fast.ops import checks


def _rows(*shape, **more):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), **more)


X, Q, TARGET = _rows(4, 6), _rows(1, 2, 6, 8), torch.tensor([0, -100, 1, 2])
IMAGE, KERNEL = _rows(2, 3, 8, 8), _rows(3, 4, 3, 3)

NUMBERS = {  # of each op: a call, and arguments as Python has them
    "cross_entropy": (
        lambda **a: ops.cross_entropy(X, TARGET, **a),
        {"ignore_index": -100, "label_smoothing": 0.25, "z_loss": 0.5},
    ),
    "linear_cross_entropy": (
        lambda **a: ops.linear_cross_entropy(X, _rows(5, 6), TARGET, **a),
        {"ignore_index": -100, "label_smoothing": 0.25, "z_loss": 0.5, "chunk": 2},
    ),
    "causal_attention": (
        lambda **a: ops.causal_attention(Q, Q, Q, seed=3, **a),
        {"scale": 0.5, "window": 2, "softcap": 8.0, "dropout": 0.25, "offset": 4, "causal": True},
    ),
    "act_dropout": (
        lambda **a: ops.act_dropout(X, **a),
        {"p": 0.25, "negative_slope": 0.125, "seed": 3, "offset": 8, "training": True},
    ),
    "batch_norm_act": (
        lambda **a: ops.batch_norm_act(X, **a),
        {"momentum": 0.5, "eps": 0.125, "negative_slope": 0.5, "training": True},
    ),
    "bias_act": (lambda **a: ops.bias_act(X, **a), {"negative_slope": 0.5, "save_output": False}),
    "layer_norm": (lambda **a: ops.layer_norm(X, **a), {"eps": 0.125}),
    "rms_norm": (lambda **a: ops.rms_norm(X, **a), {"eps": 0.125}),
    "reparameterize": (lambda **a: ops.reparameterize(X, X, **a), {"seed": 5, "offset": 3}),
    "vae_loss": (lambda **a: ops.vae_loss(X, X, X, X, **a)[0], {"beta": 0.5}),
    "rotary_tables": (lambda **a: ops.rotary_tables(**a)[0], {"positions_max": 6, "dim": 8, "base": 10000.0}),
    "rotary": (lambda **a: ops.rotary(Q, *ops.rotary_tables(8, 8), **a), {"offset": 2, "interleaved": True}),
    "conv2d": (lambda **a: ops.conv2d(IMAGE, KERNEL.transpose(0, 1), **a), {"stride": 2, "padding": 1}),
    "conv_transpose2d": (
        lambda **a: ops.conv_transpose2d(IMAGE, KERNEL, **a),
        {"stride": 2, "padding": 1, "output_padding": 1},
    ),
    "decode_linear": (lambda **a: ops.decode_linear(X, _rows(5, 6), norm_weight=torch.ones(6), **a), {"eps": 0.125}),
}
KINDS = {bool: np.bool_, int: np.int64, float: np.float32}


@pytest.mark.parametrize(("name", "argument"), [(name, a) for name, (_, given) in NUMBERS.items() for a in given])
def test_numbers_of_numpy_are_numbers(name, argument):
    call, given = NUMBERS[name]
    kind = KINDS[type(given[argument])]
    assert torch.equal(call(**{**given, argument: kind(given[argument])}), call(**given))


def test_pairs_of_numpy_are_sizes():
    expected = ops.conv_transpose2d(IMAGE, KERNEL, stride=(2, 1))
    assert torch.equal(ops.conv_transpose2d(IMAGE, KERNEL, stride=(np.int32(2), np.int64(1))), expected)


BAD = {
    "text as a flag": (lambda: ops.act_dropout(X, training="no"), TypeError, "training: expected a bool, got 'no'"),
    "text as causal": (lambda: ops.causal_attention(Q, Q, Q, causal="no"), TypeError, "causal: expected a bool"),
    "text as inplace": (lambda: ops.cross_entropy(X, TARGET, inplace="no"), TypeError, "inplace: expected a bool"),
    "two as a flag": (lambda: ops.batch_norm_act(X, training=2), TypeError, "training: expected a bool, got 2"),
    "a bool as softcap": (lambda: ops.causal_attention(Q, Q, Q, softcap=True), ValueError, "softcap: .*got True"),
    "a float as window": (lambda: ops.causal_attention(Q, Q, Q, window=2.0), ValueError, "window: .*got 2.0"),
    "text as momentum": (lambda: ops.batch_norm_act(X, momentum="x"), ValueError, "momentum: .*got 'x'"),
    "an infinite eps": (lambda: ops.batch_norm_act(X, eps=math.inf), ValueError, "eps: .*got eps inf"),
    "an infinite base": (lambda: ops.rotary_tables(5, 4, math.inf), ValueError, "base: .*got inf"),
    "a table of ints": (lambda: ops.rotary_tables(5, 4, dtype=torch.int32), TypeError, "dtype: .*got torch.int32"),
    "a long offset": (lambda: ops.act_dropout(X, seed=1, offset=2**63), ValueError, "offset: .*64 bits"),
    "a long index": (lambda: ops.cross_entropy(X, TARGET, ignore_index=2**63), ValueError, "ignore_index: .*64 bits"),
    "a beta of NaN": (
        lambda: ops.vae_loss(X, X, X, X, beta=torch.tensor(math.nan)),
        ValueError,
        "beta: .*>= 0, got nan",
    ),
    "a negative beta": (lambda: ops.vae_loss(X, X, X, X, beta=torch.tensor(-1.0)), ValueError, "beta: .*got -1.0"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_other_values_are_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_window_of_any_size_is_one():
    expected = ops.causal_attention(Q, Q, Q, causal=False)
    assert torch.equal(ops.causal_attention(Q, Q, Q, causal=False, window=2**63 - 1), expected)
    assert torch.equal(ops.causal_attention(Q, Q, Q, window=2**63 - 1), ops.causal_attention(Q, Q, Q))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        torch.Tensor.to_mkldnn,
        lambda x: torch.nested.nested_tensor([x, x[:2]]),
        lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
    ],
    ids=["sparse", "csr", "mkldnn", "nested", "jagged"],
)
def test_memory_that_is_not_dense_is_refused(convert):
    for call in (ops.layer_norm, ops.act_dropout, ops.swiglu, lambda x: ops.reparameterize(X, x)):
        with pytest.raises(TypeError, match=r"expected a dense tensor .*\.to_dense"):
            call(convert(X))


META = {
    "layer_norm": lambda: ops.layer_norm(torch.empty(3, 8)),
    "rms_norm": lambda: ops.rms_norm(torch.empty(3, 8), torch.empty(8), residual=torch.empty(3, 8))[0],
    "causal_attention": lambda: ops.causal_attention(*torch.empty(3, 1, 2, 6, 8)),
    "cross_entropy": lambda: ops.cross_entropy(torch.empty(4, 8), torch.zeros(4, dtype=torch.int64)),
    "linear_cross_entropy": lambda: ops.linear_cross_entropy(
        torch.empty(4, 8), torch.empty(5, 8), torch.zeros(4, dtype=torch.int64)
    ),
    "conv2d": lambda: ops.conv2d(torch.empty(1, 3, 8, 8), torch.empty(4, 3, 3, 3), torch.empty(4)),
    "conv_transpose2d": lambda: ops.conv_transpose2d(torch.empty(1, 3, 8, 8), torch.empty(3, 4, 3, 3)),
    "upsample_conv2d": lambda: ops.upsample_conv2d(torch.empty(1, 3, 8, 8), torch.empty(4, 3, 3, 3)),
    "gru": lambda: ops.gru(torch.empty(5, 2, 4), None, torch.empty(12, 4), torch.empty(12, 4))[0],
    "lstm": lambda: ops.lstm(torch.empty(5, 2, 4), None, None, torch.empty(16, 4), torch.empty(16, 4))[0],
    "swiglu": lambda: ops.swiglu(torch.empty(3, 8), torch.empty(3, 8)),
    "vae_loss": lambda: ops.vae_loss(*torch.empty(4, 2, 3))[0],
    "reparameterize": lambda: ops.reparameterize(*torch.empty(2, 2, 3), seed=1),
    "decode_linear": lambda: ops.decode_linear(torch.empty(2, 4), torch.empty(3, 4)),
    "layers.LayerNorm": lambda: layers.LayerNorm(8)(torch.empty(3, 8), torch.empty(3, 8))[0],
    "layers.RMSNorm": lambda: layers.RMSNorm(8)(torch.empty(3, 8)),
    "layers.GRU": lambda: layers.GRU(4, 8)(torch.empty(12, 2, 4))[0],
    "layers.ConvBNAct": lambda: layers.ConvBNAct(3, 4, 3)(torch.empty(2, 3, 8, 8)),
    "rotary": lambda: ops.rotary(torch.empty(1, 2, 3, 8), torch.empty(3, 4), torch.empty(3, 4)),
}


@pytest.mark.parametrize("name", META)
def test_a_device_without_autocast_gives_the_same_shape(name):
    """Such as meta: asking whether autocast is on there raises."""
    expected = META[name]()
    with torch.device("meta"):
        got = META[name]()
    assert got.is_meta and got.shape == expected.shape and got.dtype is expected.dtype


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.causal_attention(x, x, x),
        lambda x: ops.rms_norm(x, residual=x)[0],
        lambda x: ops.layer_norm(x, residual=x)[0],
        lambda x: ops.swiglu(x, x),
        lambda x: ops.vae_loss(x, x.detach(), x, x)[0],
        lambda x: ops.reparameterize(x, x, seed=1),
    ],
    ids=["attention", "rms_norm", "layer_norm", "swiglu", "vae_loss", "reparameterize"],
)
def test_one_tensor_twice_compiles(call):
    x = _rows(1, 2, 6, 8, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, got = call(x), compiled(x)
    assert torch.equal(got, expected)
    for g, e in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (got, expected)), strict=True):
        torch.testing.assert_close(g, e)


def test_probabilities_are_served_or_warned_of():
    logits, target, mu, logvar = _rows(4, 10, requires_grad=True), _rows(4, 10).sigmoid(), _rows(4, 3), _rows(4, 3)
    expected = ops.vae_loss(logits, target, mu, logvar, beta=0.5)
    for reduction in ("mean", "sum", "none"):
        found = ops.vae_loss(logits.sigmoid(), target, mu, logvar, beta=0.5, reduction=reduction, from_logits=False)
        for got, right in zip(
            found, ops.vae_loss(logits, target, mu, logvar, beta=0.5, reduction=reduction), strict=True
        ):
            torch.testing.assert_close(got, right)
    found = ops.vae_loss(logits.sigmoid(), target, mu, logvar, beta=0.5, from_logits=False)
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, logits), torch.autograd.grad(expected.loss, logits), rtol=1e-4, atol=1e-6
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.vae_loss(logits.sigmoid(), target, mu, logvar, from_logits=False).loss.dtype is torch.float32
    for ended in (logits.sigmoid(), logits.sigmoid().view(4, 2, 5), ops.bias_act(logits, None, "sigmoid")):
        with pytest.warns(UserWarning, match="expected logits, got the output of a sigmoid"):
            ops.vae_loss(ended, target.view(ended.shape), mu, logvar)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ending", [lambda x: x, torch.tanh, lambda x: 3 * x.sigmoid(), lambda x: x.detach().sigmoid()])
def test_other_reconstructions_are_not_warned_of(ending):
    found = ops.vae_loss(ending(_rows(4, 10, requires_grad=True)), torch.rand(4, 10), _rows(4, 3), _rows(4, 3))
    assert found.loss.isfinite()


def test_saturated_probabilities_cost_what_pytorch_says():
    recon, target = torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[1.0, 1.0, 0.0]])
    found = ops.vae_loss(recon, target, X[:1], X[:1], from_logits=False)
    assert torch.equal(found.reconstruction, F.binary_cross_entropy(recon, target, reduction="sum"))


def test_batch_norm_of_no_channels_has_a_gradient():
    x = torch.randn(4, 0, 3, requires_grad=True)
    ops.batch_norm_act(x, None, None, torch.zeros(0), torch.ones(0), False).sum().backward()
    assert x.grad.shape == x.shape


def test_numbers_are_checked_in_one_place():
    assert checks.number(np.float32(0.5)) == 0.5 and type(checks.number(np.float32(0.5))) is float
    assert type(checks.number(np.int8(3))) is int
    assert [checks.number(x) for x in (True, np.bool_(True), "1", None, torch.ones(()), 1j)] == [None] * 6


@pytest.mark.parametrize("plane", [(30, 1), (1, 30), (2, 1), (30, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((3, 4), 2, (1, 2)), ((3, 3), 1, (1, 1)), ((3, 3), 2, (1, 1)), ((1, 1), 2, 0)]
)
def test_images_one_pixel_wide_have_the_right_result_and_weight_gradient(plane, dtype, kernel, stride, padding):
    """oneDNN's in bfloat16 may read beyond them, or write columns of garbage."""
    x = _rows(3, 17, *plane).to(dtype).contiguous(memory_format=torch.channels_last)
    for call, truth, channels in ((ops.conv2d, F.conv2d, (8, 17)), (ops.conv_transpose2d, F.conv_transpose2d, (17, 8))):
        weight = _rows(*channels, *kernel).to(dtype).requires_grad_()
        wide = weight.detach().double().requires_grad_()
        try:
            right = truth(x.double(), wide, None, stride, padding)
        except RuntimeError:  # the padding leaves nothing of it
            continue
        (got,) = torch.autograd.grad(call(x, weight, None, stride, padding).float().square().sum(), weight)
        (expected,) = torch.autograd.grad(right.square().sum(), wide)
        assert torch.linalg.vector_norm(got.double() - expected) <= 0.02 * torch.linalg.vector_norm(expected)
