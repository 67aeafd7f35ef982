"""cross_entropy: what holds beyond the numerics of its cases."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from alike import assert_near

from genai_fast import ops, use_backend
from genai_fast.backends import unavailable
from genai_fast.kernels.cross_entropy.layout import as_rows, writable

BACKENDS = [backend for backend in ("reference", "cpu", "triton") if not unavailable(backend, "cpu")]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _logits(*shape, dtype=torch.float32):
    """Logits that an operation made, the leaf behind them, and targets of which some are ignored."""
    leaf = torch.randn(shape, dtype=dtype, requires_grad=True)
    target = torch.randint(shape[-1], shape[:-1])
    target[torch.rand(shape[:-1]) < 0.2] = -100
    return leaf * 1.0, leaf, target


# -- against PyTorch and by formula


@each_backend
@each_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_it_is_torchs(backend, reduction, smoothing):
    logits, leaf, target = _logits(11, 37)
    settings = dict(label_smoothing=smoothing, reduction=reduction)
    with use_backend(backend):
        loss = ops.cross_entropy(logits, target, **settings)
        upstream = torch.randn_like(loss)
        (grad,) = torch.autograd.grad(loss, leaf, upstream)
    expected = F.cross_entropy(leaf, target, **settings)
    assert_near(loss, expected)
    assert_near(grad, torch.autograd.grad(expected, leaf, upstream)[0])


@each_backend
def test_z_loss_by_its_formula(backend):
    logits, leaf, target = _logits(11, 37)
    with use_backend(backend):
        loss = ops.cross_entropy(logits, target, z_loss=0.3)
        (grad,) = torch.autograd.grad(loss, leaf)
    counted = target != -100
    expected = F.cross_entropy(leaf, target) + 0.3 * (torch.logsumexp(leaf, -1)[counted] ** 2).mean()
    assert_near(loss, expected)
    assert_near(grad, torch.autograd.grad(expected, leaf)[0])


@each_backend
def test_class_weights_by_the_recipe_of_the_docstring(backend):
    logits, leaf, target = _logits(11, 37)
    weight = torch.rand(37)
    with use_backend(backend):
        of_each = weight[target.clamp(min=0)] * (target != -100)
        loss = (ops.cross_entropy(logits, target, reduction="none") * of_each).sum() / of_each.sum()
        (grad,) = torch.autograd.grad(loss, leaf)
    expected = F.cross_entropy(leaf, target, weight)
    assert_near(loss, expected)
    assert_near(grad, torch.autograd.grad(expected, leaf)[0])


@each_backend
def test_ignored_rows_are_not_read(backend):
    """Padding may hold anything, NaN too; eager's gradient would be NaN there."""
    logits, leaf, target = _logits(9, 5)
    target[:] = torch.arange(9) % 5
    target[3], leaf.data[3], logits.data[3] = -100, float("nan"), float("nan")
    with use_backend(backend):
        loss = ops.cross_entropy(logits, target)
        (grad,) = torch.autograd.grad(loss, logits)
    kept = [0, 1, 2, 4, 5, 6, 7, 8]
    assert_near(loss, F.cross_entropy(logits[kept], target[kept]))
    assert torch.equal(grad[3], torch.zeros(5))
    assert torch.isfinite(grad).all()


@each_backend
def test_no_target_counts(backend):
    logits, leaf, _ = _logits(4, 6)
    target = torch.full((4,), -100)
    with use_backend(backend):
        mean = ops.cross_entropy(logits, target)
        assert torch.isnan(mean)
        assert float(ops.cross_entropy(logits, target, reduction="sum").detach()) == 0.0
        (grad,) = torch.autograd.grad(mean, leaf)
    assert torch.equal(grad, torch.zeros_like(leaf))


@each_backend
def test_large_logits_keep_their_gradient(backend):
    """lse as one float32 would be off by 5e-4 here."""
    x = torch.tensor([[1e4, 1e4 - 1.0, 0.0], [-1e4, -1e4 + 1.0, -1e4]], requires_grad=True)
    target = torch.tensor([0, 0])
    with use_backend(backend):
        (grad,) = torch.autograd.grad(ops.cross_entropy(x, target, reduction="sum"), x)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(wide, target, reduction="sum"), wide)
    assert_near(grad.double(), truth, 1e-6)


@each_backend
def test_a_constant_added_to_a_row_changes_nothing(backend):
    logits, _, target = _logits(6, 40)
    with use_backend(backend):
        assert_near(ops.cross_entropy(logits + 3.0, target), ops.cross_entropy(logits, target))


@each_backend
def test_a_row_does_not_depend_on_others(backend):
    logits, _, target = _logits(8, 3000)
    with use_backend(backend):
        whole = ops.cross_entropy(logits, target, reduction="none")
        parts = [ops.cross_entropy(logits[k : k + 1], target[k : k + 1], reduction="none") for k in range(8)]
        assert torch.equal(whole, torch.cat(parts))


def test_under_autocast_the_loss_is_float32():
    logits, _, target = _logits(6, 9, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = ops.cross_entropy(logits, target), F.cross_entropy(logits, target)
    assert loss.dtype is expected.dtype is torch.float32
    assert_near(loss, expected)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton here")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_more_rows_than_a_step_of_the_last_kernel(monkeypatch, reduction):
    from genai_fast.kernels.cross_entropy import triton_kernel

    monkeypatch.setattr(triton_kernel, "FINALISE", 8)
    logits, _, target = _logits(21, 5)
    with use_backend("triton"):
        got = ops.cross_entropy(logits, target, reduction=reduction)
    assert_near(got, F.cross_entropy(logits, target, reduction=reduction))


# -- layouts


def test_which_layouts_are_read_in_place():
    x = torch.randn(4, 7, 11)
    for logits in (x, x[:, :-1], x[1:, 2:5], x[0], x[:, 3], x[..., 2:9], x[:, :-1, :5], x[0, 0], x.view(2, 2, 7, 11)):
        seen, (inner, outer, stride) = as_rows(logits)
        assert seen.data_ptr() == logits.data_ptr()
        assert writable(logits)
        rows = logits.reshape(-1, logits.size(-1))
        storage = logits.untyped_storage()
        flat = torch.tensor([], dtype=x.dtype).set_(storage)
        for r in range(rows.size(0)):
            begin = logits.storage_offset() + r // inner * outer + r % inner * stride
            assert torch.equal(flat[begin : begin + rows.size(1)], rows[r])


def test_which_are_not_written():
    x = torch.randn(4, 7, 11)
    assert not writable(x.transpose(1, 2))  # a copy
    assert not writable(x[0, 0].expand(5, 11))  # one row five times
    assert not writable(x[:, :1].expand(4, 3, 11))
    assert not writable(torch.randn(20).as_strided((4, 5), (3, 1)))  # overlapping rows


@each_backend
@pytest.mark.parametrize("inplace", [False, True])
def test_strided_logits(backend, inplace):
    for cut in (lambda x: x[:, :-1], lambda x: x[:, 1], lambda x: x.transpose(1, 2), lambda x: x[0].expand(3, 5, 6)):
        leaf = torch.randn(3, 5, 6, requires_grad=True)
        logits = cut(leaf * 1.0)
        target = torch.randint(logits.size(-1), logits.shape[:-1])
        with use_backend(backend):
            (grad,) = torch.autograd.grad(ops.cross_entropy(logits, target, inplace=inplace), leaf)
        expected = F.cross_entropy(cut(leaf).flatten(0, -2), target.flatten())
        assert_near(grad, torch.autograd.grad(expected, leaf)[0])


# -- the gradient over the logits


@each_backend
@each_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inplace_gives_the_same_bits(backend, reduction, dtype):
    _, leaf, target = _logits(7, 300, dtype=dtype)
    settings = dict(label_smoothing=0.1, z_loss=0.01, reduction=reduction)
    with use_backend(backend):
        losses, grads = [], []
        for inplace in (False, True):
            x = leaf * 1.0
            loss = ops.cross_entropy(x, target, inplace=inplace, **settings)
            (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss) * 0.5)
            assert (grad.data_ptr() == x.data_ptr()) == inplace
            losses.append(loss)
            grads.append(grad)
    assert torch.equal(*losses)
    assert torch.equal(*grads)


@each_backend
def test_inplace_forward_leaves_the_logits(backend):
    logits, leaf, target = _logits(7, 30)
    with use_backend(backend):
        ops.cross_entropy(logits, target, inplace=True)
    assert torch.equal(logits, leaf)
    assert logits._version == 0


@each_backend
def test_inplace_refuses_a_second_backward(backend):
    logits, leaf, target = _logits(7, 30)
    with use_backend(backend):
        loss = ops.cross_entropy(logits, target, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cross_entropy: inplace: expected one backward"):
        torch.autograd.grad(loss, leaf)


def test_inplace_steps_aside_for_saved_tensor_hooks():
    """Autograd does not look at the versions of what hooks keep: tanh's result would be overwritten unseen."""
    leaf, target = torch.randn(7, 30, requires_grad=True), torch.randint(30, (7,))
    (expected,) = torch.autograd.grad(F.cross_entropy(torch.tanh(leaf), target), leaf)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        loss = ops.cross_entropy(torch.tanh(leaf), target, inplace=True)
    for _ in range(2):
        assert_near(torch.autograd.grad(loss, leaf, retain_graph=True)[0], expected)
    checkpointed = torch.utils.checkpoint.checkpoint(
        lambda x: ops.cross_entropy(torch.tanh(x), target, inplace=True), leaf, use_reentrant=False
    )
    assert_near(torch.autograd.grad(checkpointed, leaf)[0], expected)


FIRST = torch.zeros(7, dtype=torch.int64)
USES = {
    "square": lambda x, _: x.square().sum(),  # saves its input
    "tanh": lambda x, _: torch.tanh(x).sum(),  # saves its result
    "sum": lambda x, _: x.sum(),  # saves nothing
    "softmax": lambda x, _: (torch.softmax(x, -1) * torch.arange(30.0)).sum(),
    "product": lambda x, _: (x * x.detach()).sum(),
    "view": lambda x, _: x[:, 3:9].exp().sum() + x.view(-1)[::2].square().sum(),
    "eager": lambda x, _: F.cross_entropy(x, FIRST),
    "again": lambda x, inplace: ops.cross_entropy(x, FIRST, inplace=inplace),
    "not_inplace": lambda x, _: ops.cross_entropy(x, FIRST),
}


@pytest.mark.parametrize("order", ["before", "after", "both"])
@pytest.mark.parametrize("use", USES)
def test_inplace_beside_other_uses_is_right_or_raises(use, order):
    """Never silently wrong, whichever of them comes first."""
    _, leaf, target = _logits(7, 30)

    def gradient(inplace):
        x = leaf * 1.0
        total = USES[use](x, inplace) if order in ("before", "both") else 0.0
        total = total + ops.cross_entropy(x, target, inplace=inplace)
        total = total + (USES[use](x, inplace) if order in ("after", "both") else 0.0)
        return torch.autograd.grad(total, leaf)[0]

    expected = gradient(False)
    try:
        got = gradient(True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        assert order != "after" or use == "again"  # what comes after is differentiated before
    else:
        assert_near(got, expected)


def test_inplace_of_a_result_that_its_operation_saved():
    """tanh keeps its result for backward; that is the logits here, so backward must raise."""
    leaf = torch.randn(7, 30, requires_grad=True)
    loss = ops.cross_entropy(torch.tanh(leaf), torch.zeros(7, dtype=torch.int64), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_through_a_linear_layer():
    """The usual place: neither weight nor input is touched."""
    layer, x = torch.nn.Linear(8, 30), torch.randn(2, 5, 8, requires_grad=True)
    target = torch.randint(30, (2, 5))
    kept = [p.detach().clone() for p in (*layer.parameters(), x)]
    found = {}
    for inplace in (False, True):
        ops.cross_entropy(layer(x)[:, :-1], target[:, 1:], inplace=inplace).backward()
        found[inplace] = [p.grad for p in (*layer.parameters(), x)]
        for p in (*layer.parameters(), x):
            p.grad = None
    for a, b in zip(found[False], found[True], strict=True):
        assert_near(a, b, 1e-6)
    for p, before in zip((*layer.parameters(), x), kept, strict=True):
        assert torch.equal(p, before)


def test_inplace_steps_aside():
    """A differentiable, batched or functional gradient has memory of its own."""
    logits, leaf, target = _logits(7, 30)
    loss = ops.cross_entropy(logits, target, inplace=True)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert logits._version == 0
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    (expected,) = torch.autograd.grad(F.cross_entropy(leaf, target), leaf, create_graph=True)
    assert_near(second, torch.autograd.grad(expected.square().sum(), leaf)[0])

    losses = ops.cross_entropy(leaf * 1.0, target, reduction="none", inplace=True)
    (batch,) = torch.autograd.grad(losses, leaf, torch.eye(7), is_grads_batched=True)
    plain = F.cross_entropy(leaf, target, reduction="none")
    (expected,) = torch.autograd.grad(plain, leaf, torch.eye(7), is_grads_batched=True)
    assert_near(batch, expected)

    got = torch.func.grad(lambda x: ops.cross_entropy(x, target, inplace=True))(leaf.detach())
    assert_near(got, torch.autograd.grad(F.cross_entropy(leaf, target), leaf)[0])


def test_inplace_compiled_has_its_own_memory():
    torch._dynamo.reset()
    layer, x, target = torch.nn.Linear(8, 30), torch.randn(5, 8), torch.randint(30, (5,))

    def loss(x):
        return ops.cross_entropy(layer(x), target, inplace=True)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    (got,) = torch.autograd.grad(compiled, layer.weight)
    assert_near(got, torch.autograd.grad(F.cross_entropy(layer(x), target), layer.weight)[0])


def test_inplace_holds_one_tensor_less():
    from bench.memory import peak_bytes

    leaf, target = torch.randn(64, 3000, requires_grad=True), torch.randint(3000, (64,))

    def step(inplace):
        logits = leaf.mul(1.0)
        return torch.autograd.grad(ops.cross_entropy(logits, target, inplace=inplace), logits)

    with use_backend("cpu"):
        saved = peak_bytes(lambda: step(False), "cpu") - peak_bytes(lambda: step(True), "cpu")
    assert saved == leaf.numel() * 4


def test_inplace_without_gradients_takes_anything():
    x, target = torch.randn(4, 9), torch.randint(9, (4,))
    kept = x.clone()
    assert_near(ops.cross_entropy(x, target, inplace=True), F.cross_entropy(x, target))
    with torch.no_grad():
        ops.cross_entropy(x.requires_grad_(), target, inplace=True)
    assert torch.equal(x, kept)


# -- targets


@each_backend
def test_a_target_that_is_no_class_is_nan_past_the_checks(backend):
    """As on CUDA and in compiled regions, where nobody looks; other rows are as they are."""
    x, target = torch.randn(4, 9), torch.tensor([1, 9, -100, -1])
    settings = (None, -100, 0.1, 0.0, 0.0, "none")
    loss, lse, count, _ = torch.ops.genai_fast.cross_entropy(x, target, *settings, False, backend)
    grad = torch.ops.genai_fast.cross_entropy_backward(torch.ones(4), x, target, lse, count, *settings, backend)
    assert torch.isnan(loss).tolist() == [False, True, False, True]
    assert torch.isnan(grad).all(1).tolist() == [False, True, False, True]
    assert torch.isfinite(grad[[0, 2]]).all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_raw_operators_refuse_what_would_read_foreign_memory(backend):
    library, x, t = torch.ops.genai_fast, torch.randn(4, 9), torch.zeros(4, dtype=torch.int64)
    lse, count, g = torch.zeros(2, 4), torch.ones(2), torch.ones(())
    plain = (-100, 0.0, 0.0, 0.0)
    settings, forward = (None, *plain, "mean", backend), (*plain, "mean", True, backend)
    for call in (
        lambda: library.cross_entropy(x, t[:3], None, *forward),
        lambda: library.cross_entropy(x, t.int(), None, *forward),
        lambda: library.cross_entropy(x, t, torch.ones(8), *forward),
        lambda: library.cross_entropy(x, t, torch.ones(9).half(), *forward),
        lambda: library.cross_entropy_backward(g, x, t, lse, count, torch.ones(8), *settings[1:]),
        lambda: library.cross_entropy_backward(torch.ones(3), x, t, lse, count, torch.ones(9), *settings[1:]),
        lambda: library.cross_entropy_backward(g, x, t[:3], lse, count, *settings),
        lambda: library.cross_entropy_backward(g, x, t, lse[:1], count, *settings),
        lambda: library.cross_entropy_backward(g, x, t, lse.bfloat16(), count, *settings),
        lambda: library.cross_entropy_backward(g, x, t, lse, torch.ones(1), *settings),
        lambda: library.cross_entropy_backward(torch.ones(4), x, t, lse, count, *settings),
        lambda: library.cross_entropy_backward(g, x, t, lse, count[:0], None, *plain, "none", backend),
        lambda: library.linear_cross_entropy(
            x, x[:, :5], None, t, None, None, *plain, False, "sum", False, 2, True, True, False, backend
        ),
    ):
        with pytest.raises(ValueError, match="genai_fast: expected"):
            call()


@pytest.mark.filterwarnings("ignore::genai_fast.FallbackWarning")
@each_reduction
def test_gradcheck(reduction):
    _, leaf, target = _logits(4, 5, dtype=torch.float64)

    def function(x):
        return ops.cross_entropy(x, target, label_smoothing=0.1, z_loss=0.1, reduction=reduction)

    assert torch.autograd.gradcheck(function, leaf)
    assert torch.autograd.gradgradcheck(function, leaf)
