"""The training step's CUDA graphs: their logic with a recorder in the place of CUDA's, and on a GPU themselves."""

import contextlib
import copy
import math
import warnings

import pytest
import torch
from step_models import Averaged, batches, equal, everything, mse_of, plain_net
from torch import nn

from genai_fast import FallbackWarning
from genai_fast.models import MLPVAE
from genai_fast.models.vae.settings import VAEConfig
from genai_fast.training import Step, graph, make_optimizer


@pytest.fixture
def recorder(monkeypatch):
    """In the place of CUDA's graphs and streams: 'capturing' keeps the body, replaying runs it."""
    log = []

    @contextlib.contextmanager
    def side_stream(device):
        log.append("side")
        yield

    def capture(body, device, pool):
        log.append(f"capture {pool}")

        def replay():
            log.append("replay")
            return body()

        return replay, "pool"

    monkeypatch.setattr(graph, "aside", side_stream)
    monkeypatch.setattr(graph, "_capture", capture)
    return log


def capturable(model, **options):
    return torch.optim.Adam(model.parameters(), **{"lr": torch.tensor(0.01), **options}, fused=True, capturable=True)


def alike(order, make=capturable, **options):
    """A Step that captures and one that does not have the same course over batches of `order` rows; the first."""
    net, other = plain_net(), plain_net()
    graphed = Step(mse_of(net), make(net), graph=True, **options)
    plain = Step(mse_of(other), make(other), graph=False)
    for (x, y), rows in zip(batches(len(order)), order, strict=True):
        assert torch.equal(graphed(x[:rows], y[:rows]), plain(x[:rows], y[:rows]))
    assert equal(net, other)
    return graphed


def test_each_shape_is_captured_after_a_warm_up_that_counts(recorder):
    # Epochs of two whole batches and a smaller one, which has a warm-up of its own.
    step = alike([12, 12, 5] * 4)
    warm = ["side"] * 4 + ["capture None", "replay"]
    assert recorder == [*warm, "side", "replay", "replay", "side", "replay", "replay", "capture pool", "replay"]
    assert step.captured == 2


def test_shapes_beyond_the_limit_run_plainly(recorder):
    step = alike([12] * 4 + [5] * 5, graphs=1)
    assert recorder == ["side"] * 3 + ["capture None", "replay"] and step.captured == 1
    recorder.clear()
    assert alike([12] * 5, graphs=0).captured == 0 and not recorder


def test_what_cannot_be_captured_runs_plainly_and_says_why_once(recorder, monkeypatch):
    def capture(body, device, pool):
        try:
            return body()  # what it has in Python is done, what it has on the device is not
        finally:
            raise RuntimeError("operation failed due to a previous error")

    monkeypatch.setattr(graph, "_capture", capture)
    net, other = plain_net(), plain_net()
    calls = []

    def loss(x, y):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("called a synchronizing CUDA operation\nmore")
        return nn.functional.mse_loss(net(x), y)

    step, plain = Step(loss, capturable(net), graph=True), Step(mse_of(other), capturable(other), graph=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for x, y in batches(8):
            assert torch.equal(step(x, y), plain(x, y))  # the batch of the capture is not lost
    assert equal(net, other) and step.captured == 0 and recorder == ["side"] * 3
    (warning,) = [w for w in said if w.category is FallbackWarning]
    assert str(warning.message).endswith("its capture raised RuntimeError: called a synchronizing CUDA operation")
    assert warning.filename == __file__


def test_an_error_of_the_loss_itself_is_raised_and_not_taken_for_the_captures(recorder, monkeypatch):
    monkeypatch.setattr(graph, "_capture", lambda body, device, pool: body())
    net, calls = plain_net(), []

    def loss(x, y):
        calls.append(1)
        if len(calls) > 3:
            raise KeyError("mine")
        return nn.functional.mse_loss(net(x), y)

    step = Step(loss, capturable(net), graph=True)
    with pytest.warns(FallbackWarning), pytest.raises(KeyError, match="mine"):
        for x, y in batches(4):
            step(x, y)


def test_a_captured_step_follows_rates_and_is_captured_anew_for_other_settings(recorder):
    net = plain_net()
    optimizer = capturable(net, lr=0.1)
    step = Step(mse_of(net), optimizer, graph=True)
    ((x, y),) = batches(1)
    (group,) = optimizer.param_groups
    rate = group["lr"]
    assert isinstance(rate, torch.Tensor)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(6):
        step(x, y)
        scheduler.step()
    assert group["lr"] is rate and float(rate) == pytest.approx(0.1 / 64) and step.captured == 1
    group["lr"] = 0.25
    step(x, y)
    assert group["lr"] is rate and float(rate) == 0.25 and step.captured == 1
    group["betas"] = (0.5, 0.9)
    with pytest.warns(FallbackWarning, match="captures its CUDA graphs again"):
        step(x, y)
    assert step.captured == 0
    for _ in range(3):
        step(x, y)
    assert step.captured == 1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # other tensors than the graph knows
    with pytest.warns(FallbackWarning, match="captures its CUDA graphs again"):
        step(x, y)
    assert step.captured == 0 and optimizer.param_groups[0]["lr"] is rate


def test_no_capture_before_every_optimizer_has_begun(recorder):
    net = plain_net()
    step = Step(mse_of(net), capturable(net), graph=True)
    ((x, y),) = batches(1)
    for _ in range(5):
        step(x * math.nan, y)
    assert recorder == ["side"] * 5
    step(x, y)
    step(x, y)
    assert recorder[5:] == ["side", "capture None", "replay"] and step.skipped() == (5, 0)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", [pytest.param(p, marks=gpu) for p in ("float32", "bfloat16", "float16")])
def test_captured_steps_of_two_shapes_are_the_plain_ones_and_skip_what_is_not_finite(precision):
    results = []
    for captures in (False, True):
        model = Averaged().cuda()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=0.01, fused=True, capturable=True)
        step = Step(model, optimizer, precision=precision, clip=1.0, graph=captures)
        found = [step(x[:rows], y[:rows]).loss for (x, y), rows in zip(batches(24), [12, 5] * 12, strict=True)]
        assert step.captured == 2 * captures
        before, (skipped, _) = everything(model, optimizer), step.skipped()
        ((x, y),) = batches(1)
        step(x * math.nan, y)
        assert all(map(torch.equal, before, everything(model, optimizer))) and step.skipped() == (skipped + 1, 1)
        results.append(torch.stack(found))
    torch.testing.assert_close(*results, rtol=1e-2 if precision != "float32" else 1e-4, atol=1e-3)


@pytest.mark.parametrize("precision", [pytest.param("float32", marks=gpu)])
def test_a_loss_that_waits_for_the_device_trains_plainly(precision):
    net = plain_net().cuda()

    def loss(x, y):
        error = nn.functional.mse_loss(net(nn.functional.dropout(x, 0.1)), y)
        return error * (2.0 if error.item() > 1 else 1.0)

    step = Step(loss, torch.optim.Adam(net.parameters(), lr=0.01, fused=True, capturable=True), precision=precision)
    ((x, y),) = batches(1)
    with pytest.warns(FallbackWarning, match="its capture raised RuntimeError: called a synchronizing CUDA operation"):
        found = [float(step(x, y)) for _ in range(40)]
    assert step.captured == 0 and found[-1] < found[0]
    torch.cuda.empty_cache()  # the allocator is no longer in a capture, nor is the generator
    assert torch.rand(3, device="cuda").unique().numel() == 3
    other = plain_net().cuda()
    again = Step(mse_of(other), torch.optim.SGD(other.parameters(), lr=0.1, fused=True))
    for _ in range(6):
        again(x, y)
    assert again.captured == 1


@pytest.mark.parametrize("parts", [pytest.param(4, marks=gpu)])
def test_a_captured_step_draws_fresh_noise_and_learns_also_in_parts(parts):
    torch.manual_seed(0)
    model = MLPVAE(64, 32, 4).cuda()
    step, x = Step(model, make_optimizer(model, VAEConfig()), accumulate=parts), torch.rand(64, 1, 8, 8).round().cuda()
    losses = torch.stack([step(x).loss for _ in range(200)])
    assert step.captured == 1 and losses.unique().numel() > 190
    assert losses[-20:].mean() < 0.9 * losses[:20].mean()
