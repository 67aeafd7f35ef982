"""linear_cross_entropy: chunks, what they keep, and their gradients."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from alike import assert_near

from genai_fast import ops, use_backend
from genai_fast.backends import unavailable

BACKENDS = [backend for backend in ("reference", "cpu", "triton") if not unavailable(backend, "cpu")]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _linear(rows=(5, 7), columns=12, classes=33, dtype=torch.float32, bias=True):
    x = torch.randn(*rows, columns, dtype=dtype, requires_grad=True)
    weight = torch.randn(classes, columns, dtype=dtype, requires_grad=True)
    target = torch.randint(classes, rows)
    target[torch.rand(rows) < 0.2] = -100
    return x, weight, target, torch.randn(classes, dtype=dtype, requires_grad=True) if bias else None


@each_backend
@each_reduction
@pytest.mark.parametrize("chunk", [1, 5, 12, None])
def test_chunks_equal_the_whole(backend, reduction, chunk):
    x, weight, target, bias = _linear((3, 4))
    settings = dict(label_smoothing=0.1, z_loss=0.01, reduction=reduction)
    with use_backend(backend):
        whole = ops.cross_entropy(F.linear(x, weight, bias), target, **settings)
        upstream = torch.randn_like(whole)
        expected = torch.autograd.grad(whole, (x, weight, bias), upstream)
        loss = ops.linear_cross_entropy(x, weight, target, bias, chunk=chunk, **settings)
        got = torch.autograd.grad(loss, (x, weight, bias), upstream)
    assert_near(loss, whole)
    for a, b in zip(got, expected, strict=True):
        assert_near(a, b)


@each_reduction
def test_chunks_under_a_scaled_upstream_gradient(reduction):
    """A loss scale, a second backward and an accumulated gradient: what is kept is never scaled in place."""
    x, weight, target, bias = _linear()
    loss = ops.linear_cross_entropy(x, weight, target, bias, chunk=8, reduction=reduction).sum()
    once = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    scaled = torch.autograd.grad(loss * 1024.0, (x, weight, bias), retain_graph=True)
    again = torch.autograd.grad(loss, (x, weight, bias))
    for a, b, c in zip(once, scaled, again, strict=True):
        assert torch.equal(a, c)
        assert_near(a * 1024.0, b)


def test_an_infinite_upstream_gradient_is_seen():
    """A loss scaler must find the overflow."""
    x, weight, target, _ = _linear()
    loss = ops.linear_cross_entropy(x, weight, target, chunk=8)
    (grad,) = torch.autograd.grad(loss, weight, torch.tensor(float("inf")))
    assert not torch.isfinite(grad).all()


def test_small_gradients_of_float16_survive_a_loss_scale():
    """Divided by the rows before the scale, most would be 0 in float16."""
    x, weight, target, _ = _linear((4096,), 8, 65, torch.float16)
    with torch.no_grad():
        x *= 1e-3
    scale = torch.tensor(4096.0)
    loss = ops.linear_cross_entropy(x, weight, target)
    grads = torch.autograd.grad(loss, (x, weight), scale)
    wide = [p.detach().double().requires_grad_() for p in (x, weight)]
    truth = torch.autograd.grad(F.cross_entropy(F.linear(*wide), target), wide, scale.double())
    for a, b in zip(grads, truth, strict=True):
        assert (a.double() - b).norm() / b.norm() < 3e-3


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
@each_reduction
def test_only_what_is_needed_gets_a_gradient(frozen, reduction):
    x, weight, target, bias = _linear()
    leaves = dict(x=x, weight=weight, bias=bias)
    leaves.pop(frozen).requires_grad_(False)
    loss = ops.linear_cross_entropy(x, weight, target, bias, chunk=8, reduction=reduction).sum()
    expected = F.cross_entropy(F.linear(x, weight, bias).flatten(0, 1), target.flatten(), reduction=reduction).sum()
    for a, b in zip(*(torch.autograd.grad(y, list(leaves.values())) for y in (loss, expected)), strict=True):
        assert_near(a, b)


def test_chunks_without_a_target_that_counts():
    x, weight, target, _ = _linear()
    target[:] = -100
    loss = ops.linear_cross_entropy(x, weight, target, chunk=8)
    assert torch.isnan(loss)
    for grad in torch.autograd.grad(loss, (x, weight)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_whole_logits_never_exist():
    from bench.memory import peak_bytes

    x, weight, target, _ = _linear((512,), 16, 1000, bias=False)

    def step(chunk):
        return torch.autograd.grad(ops.linear_cross_entropy(x, weight, target, chunk=chunk), (x, weight))

    logits = 512 * 1000 * 4
    assert peak_bytes(lambda: step(32), "cpu") < logits / 4 < logits <= peak_bytes(lambda: step(512), "cpu")


def test_chunks_under_autocast():
    x, weight, target, bias = _linear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(x, weight, target, bias, chunk=8)
        expected = F.cross_entropy(F.linear(x, weight, bias).flatten(0, 1), target.flatten())
    assert loss.dtype is torch.float32
    assert_near(loss, expected, 2e-3)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight, bias)) for y in (loss, expected)), strict=True):
        assert a.dtype is torch.float32
        assert (a - b).norm() / b.norm() < 2e-2
    with pytest.raises(TypeError, match="weight"):
        ops.linear_cross_entropy(x, weight.bfloat16(), target)


def test_accumulated_gradients_are_those_of_the_sum():
    """Gradients scaled where they lie become .grad; the next ones must be added to them."""
    x, weight, target, bias = _linear()
    parameters = (x, weight, bias)
    for scale in (1.0, 3.0):
        (scale * ops.linear_cross_entropy(x, weight, target, bias, chunk=8)).backward()
    loss = F.cross_entropy(F.linear(*parameters).flatten(0, 1), target.flatten())
    expected = torch.autograd.grad(4.0 * loss, parameters)
    for p, e in zip(parameters, expected, strict=True):
        assert_near(p.grad, e)


@pytest.mark.parametrize("hooks", [False, True])
def test_gradients_that_are_batched_or_hooked(hooks):
    x, weight, target, _ = _linear(bias=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x) if hooks else nullcontext():
        loss = ops.linear_cross_entropy(x, weight, target, chunk=8)
    scales = torch.tensor([1.0, 2.0])
    batch = torch.autograd.grad(loss, (x, weight), scales, is_grads_batched=True, retain_graph=hooks)
    expected = torch.autograd.grad(F.cross_entropy(F.linear(x, weight).flatten(0, 1), target.flatten()), (x, weight))
    for got, e in zip(batch, expected, strict=True):
        assert_near(got, torch.stack((e, 2.0 * e)))


def test_checkpointed():
    from torch.utils.checkpoint import checkpoint

    x, weight, target, _ = _linear(bias=False)

    def loss(x, weight):
        return ops.linear_cross_entropy(torch.tanh(x), weight, target, chunk=8)

    got = torch.autograd.grad(checkpoint(loss, x, weight, use_reentrant=False), (x, weight))
    for a, b in zip(got, torch.autograd.grad(loss(x, weight), (x, weight)), strict=True):
        assert torch.equal(a, b)


def test_backward_holds_one_weight():
    """Of a graph that goes, gradients are scaled where they lie."""
    from bench.memory import peak_bytes

    x, weight, target, _ = _linear((32,), 64, 5000, bias=False)

    def step():
        return torch.autograd.grad(ops.linear_cross_entropy(x, weight, target, chunk=8), weight)

    assert peak_bytes(step, "cpu") < 1.5 * weight.numel() * 4


@pytest.mark.filterwarnings("ignore::genai_fast.FallbackWarning")
@each_reduction
def test_gradcheck(reduction):
    x, weight, target, bias = _linear((5,), 3, 4, torch.float64)
    target[0] = 1

    def chunked(x, weight, bias):
        settings = {"label_smoothing": 0.1, "z_loss": 0.1, "reduction": reduction}
        return ops.linear_cross_entropy(x, weight, target, bias, chunk=2, **settings)

    assert torch.autograd.gradcheck(chunked, (x, weight, bias))
    assert torch.autograd.gradgradcheck(chunked, (x, weight, bias))
