"""layer_norm and rms_norm where the spec's cases do not reach: blocks that carry h on, autocast, layers."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close
from torch import nn

from genai_fast import ops, use_backend
from genai_fast.backends import unavailable
from genai_fast.kernels.layer_norm import cpu_kernel
from genai_fast.layers import LayerNorm, RMSNorm

PAIRS = [(nn.LayerNorm, LayerNorm), (nn.RMSNorm, RMSNorm)]


def _names(pair):
    return pair[1].__name__


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Block(nn.Module):
    """Two branches of a pre-norm Transformer block, with plain norms or with ours."""

    def __init__(self, norm, fused):
        super().__init__()
        self.norms = nn.ModuleList([norm(24), norm(24)])
        self.branch = nn.Linear(24, 24)
        self.fused = fused

    def forward(self, x, h):
        for norm in self.norms:
            if self.fused:
                y, h = norm(x, h)
            else:
                h = x + h
                y = norm(h)
            x = self.branch(y)
        return x, h


@pytest.mark.parametrize("pair", PAIRS, ids=_names)
def test_a_block_that_carries_the_sum_on(pair):
    stock, ours = pair
    plain, fused = Block(stock, False), Block(ours, True)
    fused.load_state_dict(plain.state_dict())
    x, h = torch.randn(2, 3, 7, 24)
    found = []
    for model in (plain, fused):
        given = x.clone().requires_grad_(), h.clone().requires_grad_()
        outputs = model(*given)
        total = outputs[0].square().sum() + outputs[1].sin().sum()
        found.append([*outputs, *torch.autograd.grad(total, [*given, *model.parameters()])])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, 1e-4)


def test_only_the_sum_is_used():
    x, h = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    weight = torch.ones(8, requires_grad=True)
    _, total = ops.layer_norm(x, weight, residual=h)
    grads = torch.autograd.grad(total.sum(), (x, h, weight), allow_unused=True)
    assert torch.equal(grads[0], torch.ones(4, 8)) and torch.equal(grads[1], torch.ones(4, 8))
    assert grads[2] is None


def test_gradients_of_two_inputs_do_not_share_memory_that_is_written():
    x, h = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    for _ in range(2):  # the second is added in place
        y, total = ops.layer_norm(x, residual=h)
        (y.sum() + 2 * total.sum()).backward()
    assert_close(x.grad, torch.full((4, 8), 4.0), 1e-5)
    assert_close(h.grad, torch.full((4, 8), 4.0), 1e-5)


def test_the_sum_must_stay_until_backward():
    x = torch.randn(4, 8, requires_grad=True)
    y, h = ops.layer_norm(x, residual=torch.randn(4, 8))
    h += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore::genai_fast.FallbackWarning")
def test_rms_norm_takes_the_eps_of_torch():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.full((2, 8), 1e-3).to(dtype)
        assert_close(ops.rms_norm(x).float(), F.rms_norm(x, (8,)).float(), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_on_the_cpu_is_that_of_torch(dtype):
    x, weight, bias = torch.randn(4, 8, dtype=dtype), torch.rand(8) + 0.5, torch.randn(8)
    residual = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.layer_norm(x, weight, bias)
        expected = F.layer_norm(x, (8,), weight, bias)
        sums = ops.layer_norm(x, weight, bias, residual=residual)
        expected_sum = x + residual
    assert_close(got.float(), expected.float(), 1e-2)
    assert got.dtype is expected.dtype
    assert sums[0].dtype is sums[1].dtype is expected_sum.dtype is torch.float32
    assert_close(sums[1], expected_sum, 1e-6)


@pytest.mark.parametrize("op", [ops.layer_norm, ops.rms_norm])
def test_autocast_takes_narrow_parameters_beside_a_wider_sum(op):
    """A bfloat16 model whose residual stream is float32; without autocast it is refused."""
    x, weight = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(8, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = op(x, weight, residual=residual)
    expected = op(x.float(), weight.float(), residual=residual)
    assert_close(y, expected[0], 1e-6)
    assert_close(h, expected[1], 1e-6)
    assert torch.autograd.grad(y.sum(), weight)[0].dtype is torch.bfloat16
    with pytest.raises(TypeError, match=r"weight.*expected torch\.float32"):
        op(x.float(), weight)


@pytest.mark.parametrize("op", [ops.layer_norm, ops.rms_norm])
def test_batched_gradients(op):
    x, residual, weight = torch.randn(3, 5), torch.randn(3, 5), torch.rand(5)
    given = x.clone().requires_grad_()
    y, h = op(given, weight, residual=residual)
    y = y + 2.0 * h
    directions = torch.eye(y.numel()).view(-1, *y.shape)
    (batch,) = torch.autograd.grad(y, given, directions, is_grads_batched=True, retain_graph=True)
    alone = torch.stack([torch.autograd.grad(y, given, d, retain_graph=True)[0] for d in directions])
    assert_close(batch, alone, 1e-5)


@pytest.mark.parametrize("pair", PAIRS, ids=_names)
@pytest.mark.parametrize("shape", [(6,), (4, 6)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_layers_are_the_stock_ones(pair, shape, affine):
    stock, ours = (norm(shape, 1e-3, affine) for norm in pair)
    if affine:
        nn.init.normal_(stock.weight)
    ours.load_state_dict(stock.state_dict())
    x, residual = torch.randn(2, 3, 4, 6)
    assert_close(ours(x), stock(x), 1e-5)
    y, h = ours(x, residual)
    assert_close(h, x + residual, 1e-6)
    assert_close(y, stock(x + residual), 1e-5)
    assert repr(ours) == repr(stock)
    copied = pickle.loads(pickle.dumps(ours))
    assert_close(copied(x), stock(x), 1e-5)


def test_a_layer_norm_without_bias():
    stock, ours = nn.LayerNorm(6, bias=False), LayerNorm(6, bias=False)
    x = torch.randn(3, 6)
    assert_close(ours(x), stock(x), 1e-5)
    assert [*ours.state_dict()] == [*stock.state_dict()] == ["weight"]


@pytest.mark.parametrize("pair", PAIRS, ids=_names)
def test_layers_refuse_another_width_as_the_stock_ones(pair):
    for norm in pair:
        with pytest.raises(RuntimeError, match="normalized_shape"):
            norm(8, elementwise_affine=False)(torch.randn(2, 6))


@pytest.mark.skipif(bool(unavailable("cpu", "cpu")), reason="no extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [ops.layer_norm, ops.rms_norm])
def test_large_tensors_are_the_same_bits(op, dtype):
    """Large results are written past the caches, of rows that begin anywhere in a vector."""
    x, residual, grad_y, grad_h = (torch.randn(2100, 1003).to(dtype) for _ in range(4))
    weight = torch.rand(1003)

    def results(rows):
        given = x[rows].requires_grad_(), residual[rows].requires_grad_()
        outputs = op(given[0], weight, residual=given[1])
        return *outputs, *torch.autograd.grad(outputs, given, (grad_y[rows], grad_h[rows]))

    with use_backend("cpu"):
        large = results(slice(None))
        for rows in (slice(0, 40), slice(1049, 1051), slice(2060, 2100)):
            for whole, part in zip(large, results(rows), strict=True):
                assert torch.equal(whole[rows], part)


@pytest.mark.skipif(bool(unavailable("cpu", "cpu")), reason="no extension")
def test_kernels_refuse_what_would_read_foreign_memory():
    x, rows = torch.zeros(4, 8), torch.zeros(4)
    for call in (
        lambda: cpu_kernel.layer_norm(x, torch.zeros(4, 7), None, None, False, 1e-5, "gemma"),
        lambda: cpu_kernel.layer_norm(x, None, torch.zeros(7), None, False, 1e-5, "gemma"),
        lambda: cpu_kernel.layer_norm_backward(x, x[:2], x, None, rows, rows, True, True, False, "gemma"),
        lambda: cpu_kernel.layer_norm_backward(x, None, x, None, rows[:2], rows, True, True, False, "gemma"),
        lambda: cpu_kernel.layer_norm_backward(x, None, x, None, rows, rows.double(), True, True, True, "gemma"),
    ):
        with pytest.raises(ValueError, match="genai_fast: expected"):
            call()
