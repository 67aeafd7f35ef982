"""The GRU layer against nn.GRU, and what the cases of the ops do not say."""

import copy
import pickle

import pytest
import torch
from alike import assert_alike, assert_close, assert_gradients, step
from torch import nn

from genai_fast import FallbackWarning, ops, use_backend
from genai_fast.backends import unavailable
from genai_fast.fusion import thresholds
from genai_fast.kernels.recurrent import tiles
from genai_fast.layers import GRU
from genai_fast.layers import recurrent as layer
from genai_fast.registry import OPS
from genai_fast.testing import Run, assert_matches_reference, poisoned_memory

pytestmark = pytest.mark.usefixtures("small_is_fused")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """How often ops.gru is called."""
    made, op = [], ops.gru
    monkeypatch.setattr(ops, "gru", lambda *args: made.append(args) or op(*args))
    return made


def _pair(*args, **options):
    """Ours and nn.GRU with the same weights."""
    ours = GRU(*args, **options)
    plain = nn.GRU(*args, **options)
    plain.load_state_dict(ours.state_dict(), strict=True)
    return ours, plain


OPTIONS = {
    "plain": {},
    "layers": {"num_layers": 3},
    "no_bias": {"bias": False},
    "batch_first": {"batch_first": True, "num_layers": 2},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("state", [False, True])
def test_layer_is_nn_gru(name, state, calls):
    options = OPTIONS[name]
    ours, plain = _pair(6, 21, **options)
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    x = torch.randn(7, 4, 6) if not options.get("batch_first") else torch.randn(4, 7, 6)
    inputs = (x, torch.randn(count, 4, 21)) if state else (x,)
    assert_alike(ours, plain, *inputs)
    assert len(calls) == count * 5  # three steps and twice in evaluation


def test_layer_without_a_batch(calls):
    ours, plain = _pair(5, 8, 2, batch_first=True)
    assert_alike(ours, plain, torch.randn(6, 5), torch.randn(2, 8))
    assert calls


def test_a_state_carried_from_part_to_part_is_one_sequence(calls):
    ours, plain = _pair(5, 16)
    x = torch.randn(12, 3, 5)
    h, parts = None, []
    for part in x.split(4):
        y, h = ours(part, h)
        h = h.detach_()  # truncated backpropagation: h_n is no view of y
        parts.append(y)
    assert_close(torch.cat(parts), plain(x)[0])
    assert len(calls) == 3


def test_gradient_through_the_last_state_alone():
    ours, plain = _pair(5, 16, 2)
    x = torch.randn(6, 3, 5)
    found, expected = ({}, {})
    for model, kept in ((ours, found), (plain, expected)):
        grads = torch.autograd.grad(model(x)[1].pow(2).sum(), [*model.parameters()])
        kept.update(zip(dict(model.named_parameters()), grads, strict=True))
    assert_gradients(found, expected)


def test_dropout_between_layers():
    ours = GRU(5, 300, 2, dropout=0.4)
    x, seen, op = torch.randn(20, 8, 5), [], ops.gru
    layer.ops.gru = lambda x, *rest: seen.append(x) or op(x, *rest)
    try:
        torch.manual_seed(1)
        first = ours(x)[0]
        torch.manual_seed(1)
        assert torch.equal(first, ours(x)[0])
        assert not torch.equal(first, ours(x)[0])
        ours.eval()
        assert torch.equal(ours(x)[0], ours(x)[0])
    finally:
        layer.ops.gru = op
    between, whole = seen[1], op(x, None, *ours._weights(0, ""))[0]
    kept = between != 0
    assert abs(kept.float().mean().item() - 0.6) < 0.02
    assert_close(between, torch.where(kept, whole / 0.6, 0.0))


def test_parametrized_weights_are_read_anew(calls):
    ours = GRU(5, 8)
    plain = copy.deepcopy(ours)
    plain.__class__ = nn.GRU
    nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    nn.utils.parametrizations.weight_norm(plain, "weight_hh_l0")
    x = torch.randn(4, 3, 5)
    (found, found_gradients), (expected, expected_gradients) = step(ours, x), step(plain, x)
    assert_close(found[0], expected[0])
    assert_gradients(found_gradients, expected_gradients)
    assert calls


def test_copies_and_pickles():
    ours, plain = _pair(5, 8, 2)
    x = torch.randn(4, 3, 5)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), GRU(5, 8, 2)):
        again.load_state_dict(plain.state_dict())
        assert type(again) is GRU
        assert_close(again(x)[0], plain(x)[0])


def test_packed_sequences_are_left_to_pytorch(calls):
    layer._served.cache_clear()
    ours, plain = _pair(5, 8)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(6, 3, 5), [6, 4, 1])
    with pytest.warns(FallbackWarning, match="packed sequences"):
        found = ours(packed)
    assert torch.equal(found[0].data, plain(packed)[0].data)
    ours(packed)  # said once
    assert not calls


def test_double_precision_is_left_to_pytorch(calls):
    layer._served.cache_clear()
    ours, plain = _pair(5, 8, dtype=torch.float64)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    with pytest.warns(FallbackWarning, match="float64"):
        assert torch.equal(ours(x)[0], plain(x)[0])
    assert not calls


def test_a_few_steps_are_left_to_pytorch(calls):
    thresholds._ignored.set(False)  # as users have it; the fixture puts it back
    ours, plain = _pair(5, 8, batch_first=True)
    x = torch.randn(200, 3, 5)
    assert torch.equal(ours(x)[0], plain(x)[0])
    assert not calls


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(torch.randn(6, 3, 4)),
        lambda m: m(torch.randn(6, 3, 2, 5)),
        lambda m: m(torch.randn(6, 3, 5), torch.randn(1, 2, 8)),
        lambda m: m(torch.randn(6, 3, 5), torch.randn(1, 8)),
        lambda m: m(torch.randn(6, 3, 5).double()),
        lambda m: m(torch.randn(0, 3, 5)),
    ],
)
def test_errors_are_pytorchs(call, calls):
    said = []
    for model in _pair(5, 8):
        with pytest.raises((RuntimeError, ValueError)) as error:
            call(model)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert not calls


@pytest.mark.parametrize("steps", [7, 8])
def test_autocast_gives_the_dtype_of_nn_gru(calls, steps):
    ours, plain = _pair(5, 32, 2)
    x = torch.randn(steps, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        (found, h_n), (expected, last) = ours(x), plain(x)
        found.float().sum().backward()
    assert found.dtype is expected.dtype and h_n.dtype is last.dtype
    assert ours.weight_hh_l0.grad.dtype is torch.float32
    assert_close(found.float(), expected.float(), 2e-2)
    assert calls


@pytest.mark.parametrize("allowed", [False, True])
def test_compiled_layer(allowed):
    """PyTorch's compiler takes an RNN into its graph where `allow_rnn` says so, and else calls it between two."""
    torch._dynamo.reset()
    ours, plain = _pair(5, 16, 2)
    x = torch.randn(6, 3, 5)
    with torch._dynamo.config.patch(allow_rnn=allowed):
        compiled = torch.compile(ours, fullgraph=allowed, backend="aot_eager")
        (found, found_gradients), (expected, expected_gradients) = step(compiled, x), step(plain, x)
    assert_close(found[0], expected[0])
    assert_gradients({k.removeprefix("_orig_mod."): g for k, g in found_gradients.items()}, expected_gradients)


def test_transforms_see_pytorchs_operators(calls):
    ours, plain = _pair(5, 8)
    x = torch.randn(6, 3, 5)
    results = []
    for model in (ours, plain):
        loss = lambda p, m=model: torch.func.functional_call(m, p, (x,))[0].pow(2).sum()  # noqa: E731
        results.append(torch.func.grad(loss)({k: p.detach() for k, p in model.named_parameters()}))
    assert_gradients(*results)
    assert not calls


def test_layer_does_as_told_by_use_backend(calls):
    ours, plain = _pair(5, 8)
    x = torch.randn(4, 3, 5)
    for backend in ("reference", "cpu", "triton"):
        with use_backend(backend):
            assert_close(ours(x)[0], plain(x)[0])
    assert len(calls) == 3


# --- the ops


def test_the_last_state_is_the_last_result():
    y, h_n = ops.gru(torch.randn(5, 3, 4), None, torch.randn(24, 4), torch.randn(24, 8))
    assert torch.equal(y[-1], h_n) and y.data_ptr() != h_n.data_ptr()


def test_a_later_input_changes_no_earlier_result():
    x, weights = torch.randn(9, 4, 6), (torch.randn(60, 6), torch.randn(60, 20))
    changed = x.clone()
    changed[5:] = torch.randn(4, 4, 6)
    assert torch.equal(ops.gru(x, None, *weights)[0][:5], ops.gru(changed, None, *weights)[0][:5])


def test_more_threads_than_hidden_units_and_cores():
    """Some threads then own nothing, and all must pass every barrier."""
    x, weights = torch.randn(30, 900, 3), (torch.randn(60, 3), torch.randn(60, 20))
    expected, threads = ops.gru(x, None, *weights)[0], torch.get_num_threads()
    try:
        torch.set_num_threads(9)
        found = ops.gru(x, None, *weights)[0]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, expected)


def test_lstm_on_the_cpu_is_pytorchs():
    lstm = nn.LSTM(5, 8)
    x, h, c = torch.randn(6, 3, 5), torch.randn(3, 8), torch.randn(3, 8)
    y, (h_n, c_n) = lstm(x, (h[None], c[None]))
    for found, expected in zip(ops.lstm(x, h, c, *lstm._flat_weights), (y, h_n[0], c_n[0]), strict=True):
        assert_close(found, expected)


def test_second_derivative_of_lstm_on_the_cpu():
    """A gradient penalty through PyTorch's own."""
    x = torch.randn(4, 3, 5, requires_grad=True)
    weights = (torch.randn(32, 5), torch.randn(32, 8).requires_grad_())
    (gradient,) = torch.autograd.grad(ops.lstm(x, None, None, *weights)[0].sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(gradient.pow(2).sum(), weights[1])
    with use_backend("reference"):
        (gradient,) = torch.autograd.grad(ops.lstm(x, None, None, *weights)[0].sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(gradient.pow(2).sum(), weights[1])
    assert_close(found, expected, 1e-4)


def test_raw_operators_refuse_what_would_read_foreign_memory():
    library = torch.ops.genai_fast
    gates, h, weight = torch.zeros(4, 3, 15), torch.zeros(3, 5), torch.zeros(15, 5)
    y, saved = torch.zeros(4, 3, 5), torch.zeros(4, 3, 20)
    for backend in ("cpu", "triton"):
        for call in (
            lambda b: library.gru(gates, torch.zeros(3, 6), weight, None, True, b),
            lambda b: library.gru(gates, h, weight[:, :4], None, True, b),
            lambda b: library.gru(gates, h, weight, torch.zeros(4), True, b),
            lambda b: library.gru_backward(y[:3], None, saved, y, h, weight, b),
            lambda b: library.gru_backward(y, None, saved[..., :15], y, h, weight, b),
            lambda b: library.gru_backward(None, h[:2], saved, y, h, weight, b),
        ):
            with pytest.raises(ValueError, match="genai_fast: expected"):
                call(backend)
    for call in (
        lambda: library.lstm(gates, h, h, weight, True, "triton"),
        lambda: library.lstm_backward(y, None, None, saved, h, torch.zeros(20, 5), "triton"),
    ):
        with pytest.raises(ValueError, match="genai_fast: expected"):
            call()


# --- one launch for all steps, and one a step


ONE_BY_ONE = [
    Run(op, case, torch.float32, "triton", "cpu")
    for op in (OPS["gru"], OPS["lstm"])
    for case in op.cases
    if case.name in ("no_state", "no_bias", "special_values")
]


@pytest.mark.parametrize("run", ONE_BY_ONE, ids=str)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_steps_that_are_launched_one_by_one(run, monkeypatch):
    """Where a layer does not fit on chip."""
    if unavailable("triton", "cpu"):
        pytest.skip(unavailable("triton", "cpu"))
    refused = []
    monkeypatch.setattr(tiles, "plan", lambda *sizes: refused.append(sizes))
    assert_matches_reference(run)
    assert len(refused) == 2


@pytest.mark.parametrize("hidden", [1, 16, 37, 208, 256, 304, 512])
@pytest.mark.parametrize(("size", "exact"), [(2, False), (4, False), (4, True)])
@pytest.mark.parametrize("backward", [False, True])
def test_programs_of_a_launch_all_run_at_the_same_time(hidden, size, exact, backward):
    for batch in (1, 16, 17, 128, 256, 1000):
        for multiprocessors, shared in ((132, 227 * 1024), (108, 163 * 1024), (170, 99 * 1024), (0, 0)):
            plan = tiles.plan(batch, hidden, size, backward, exact, multiprocessors, shared)
            if plan is None:
                continue
            (groups, blocks), tile = plan
            assert groups * blocks <= multiprocessors
            assert groups * tile["UNITS"] >= hidden and blocks * tile["BLOCK_B"] >= batch and tile["WIDTH"] >= hidden
            weights = 3 * hidden * min(hidden, tile["UNITS"]) * size
            assert weights < tiles.shared_bytes(tile, size, backward) <= shared


def test_which_layers_run_in_one_launch_on_an_h100():
    def fits(batch, hidden, size, exact=False):
        return [bool(tiles.plan(batch, hidden, size, b, exact, 132, 227 * 1024)) for b in (False, True)]

    for sizes in ((128, 256, 2), (256, 256, 2), (128, 512, 2), (128, 256, 4)):
        assert fits(*sizes) == [True, True]
    for sizes in ((512, 256, 2), (256, 512, 2), (128, 512, 4), (128, 1024, 2), (0, 256, 2), (8, 100, 2)):
        assert fits(*sizes) == [False, False]
    assert fits(128, 256, 4, exact=True) == [True, False]


@pytest.fixture
def barrier():
    if unavailable("triton", "cpu"):
        pytest.skip(unavailable("triton", "cpu"))
    from bench.gpu_gate import barrier

    return barrier


def test_barrier_check_passes_what_is_right(barrier):
    checked = dict(barrier.calls("cpu", 3, ((17, 20, torch.float16), (3, 999, torch.float32))))
    assert list(checked) == ["gru 3x17x20 float16", "lstm 3x17x20 float16"]
    assert [barrier.wrong(call, repeats=1) for call in checked.values()] == ["", ""]


def test_barrier_check_sees_a_state_that_came_too_late(barrier, monkeypatch):
    """All steps in one launch of two programs, which Triton's interpreter runs one after the other."""
    from genai_fast.kernels.recurrent import sequence_triton, triton_kernel

    monkeypatch.setattr(triton_kernel, "_room", lambda device: (64, 2**20, 16))
    monkeypatch.setattr(triton_kernel, "steps_a_launch", lambda steps, grid: steps)
    monkeypatch.setattr(sequence_triton, "wait", lambda counter, count: None)
    ((_, call), *_) = barrier.calls("cpu", 3, ((2, 24, torch.float32),))
    with poisoned_memory():
        assert "differs from one launch a step" in barrier.wrong(call, repeats=1)
