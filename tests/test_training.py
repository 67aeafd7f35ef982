"""The step, its capture logic (with a recorder in the place of the graph), the loop, and timed comparison."""

import contextlib
import dataclasses
import io
import json
import math

import pytest
import torch

from genai_fast import data
from genai_fast.models import MLPVAE
from genai_fast.training import Step, TrainingStopped, fit, loop, make_optimizer
from genai_fast.training import step as step_module
from genai_fast.training.config import VAEConfig

CONFIG = VAEConfig(data="digits", epochs=2, batch_size=256, hidden=32, latent=4, log_every=3)


def new(seed=0, config=CONFIG, **adam):
    torch.manual_seed(seed)
    model = MLPVAE(64, config.hidden, config.latent)
    optimizer = torch.optim.Adam(model.parameters(), **adam) if adam else make_optimizer(model, config)
    return model, optimizer


def digits():
    return data.load("digits").split(0.1, seed=0)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_is_the_loop_that_everyone_writes(clip):
    x = digits()[0].batch(slice(0, 32))
    (model, optimizer), (other, adam) = new(), new()
    step = Step(model, optimizer, clip=clip)
    torch.manual_seed(1)
    losses = [step(x) for _ in range(3)]
    torch.manual_seed(1)
    for ours in losses:
        adam.zero_grad()
        theirs = other.training_step(x)
        theirs.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), clip or math.inf)
        assert not clip or norm > clip  # it does clip
        adam.step()
        assert torch.equal(ours.loss, theirs.loss) and not ours.loss.requires_grad
    assert equal(model, other)


@pytest.fixture
def recorder(monkeypatch):
    """In the place of CUDA's graphs and streams: 'capturing' keeps the body, replaying runs it."""
    log = []

    @contextlib.contextmanager
    def side_stream(device):
        log.append("side")
        yield

    def capture(body):
        log.append("capture")

        def replay():
            log.append("replay")
            return body()

        return replay

    monkeypatch.setattr(step_module, "_side_stream", side_stream)
    monkeypatch.setattr(step_module, "_capture", capture)
    return log


def test_the_graph_serves_one_shape_after_a_warm_up_that_counts(recorder):
    train, _ = digits()
    (model, optimizer), (other, adam) = new(lr=1e-3, capturable=False), new(lr=1e-3, capturable=False)
    for group in optimizer.param_groups:
        group["capturable"] = True  # as Step asks; the CPU's Adam itself refuses it
    graphed = Step(model, optimizer, graph=True)
    for group in optimizer.param_groups:
        group["capturable"] = False
    plain = Step(other, adam)
    # Epochs of two whole batches and a smaller one: the smaller is neither captured nor restarts the warm-up.
    order = [slice(0, 64), slice(64, 128), slice(128, 140)] * 3
    batches = [train.batch(s) for s in order]
    torch.manual_seed(5)
    expected = [plain(x).loss for x in batches]
    torch.manual_seed(5)
    got = [graphed(x).loss for x in batches]
    assert torch.equal(torch.stack(got), torch.stack(expected)) and equal(model, other)
    # whole, whole, small, whole: warm-up; whole: captured; then small runs plainly and whole is replayed.
    assert recorder == ["side"] * 4 + ["capture", "replay"] + ["replay"] * 2


def test_a_graph_asks_for_a_capturable_optimizer():
    model, optimizer = new(lr=1e-3)
    with pytest.raises(
        ValueError, match=r"capturable=False; remedy: torch\.optim\.Adam\(.*fused=True, capturable=True"
    ):
        Step(model, optimizer, graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_draws_fresh_noise_and_learns():
    model, _ = new()
    model.cuda()
    step, x = Step(model, make_optimizer(model, CONFIG)), digits()[0].batch(slice(0, 256)).cuda()
    losses = torch.stack([step(x).loss for _ in range(200)])
    assert step._replay is not None and losses.unique().numel() > 190
    assert losses[-20:].mean() < 0.9 * losses[:20].mean()


def run(tmp_path, config=CONFIG, stream=None, **new_arguments):
    model, optimizer = new(**new_arguments)
    return model, fit(model, optimizer, *digits(), config, tmp_path, stream=stream or io.StringIO())


def records(path):
    return [json.loads(line) for line in (path / loop.METRICS).read_text().splitlines()]


def test_metrics_and_lines(tmp_path):
    stream = io.StringIO()
    _, last = run(tmp_path, stream=stream)
    found = records(tmp_path)
    steps, epochs = ([r for r in found if r["kind"] == kind] for kind in ("step", "epoch"))
    # 1617 images: 7 steps an epoch; a record every third step and at an epoch's end.
    assert [r["step"] for r in steps] == [3, 6, 7, 9, 12, 14]
    assert [(r["epoch"], r["step"]) for r in epochs] == [(1, 7), (2, 14)] and epochs[-1] == last
    assert all(set(r) == {"kind", "epoch", "step", "samples_per_second", "loss", "reconstruction", "kl"} for r in steps)
    for r in epochs:
        assert set(r["train"]) == set(r["validation"]) == {"loss", "reconstruction", "kl"}
        assert r["validation"]["loss"] == pytest.approx(r["validation"]["reconstruction"] + r["validation"]["kl"])
        assert r["samples_per_second"] > 0
    assert epochs[1]["train"]["loss"] < epochs[0]["train"]["loss"]
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and lines[1].startswith(f"epoch 2/2  loss {last['train']['loss']:.2f}  validation")


def test_an_epochs_mean_weighs_samples_not_batches(tmp_path):
    class Counts(MLPVAE):
        def training_step(self, x):
            losses = super().training_step(x)
            return losses._replace(kl=losses.kl.detach() * 0 + len(x))

    torch.manual_seed(0)
    model = Counts(64, 8, 2)
    train, validation = digits()
    last = fit(model, make_optimizer(model, CONFIG), train, validation, CONFIG, tmp_path, stream=io.StringIO())
    assert last["train"]["kl"] == pytest.approx((6 * 256**2 + 81**2) / 1617)
    assert last["validation"]["kl"] == len(validation) == 180


def test_validation_has_its_own_noise_and_leaves_training_alone():
    model, _ = new()
    _, validation = digits()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = loop.evaluate(model, validation, CONFIG)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    torch.manual_seed(2)
    assert loop.evaluate(model, validation, CONFIG) == first


def test_a_terminal_gets_a_bar(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    run(tmp_path, stream=stream)
    text = stream.getvalue()
    assert "epoch 2/2" in text and "samples/s" in text and "loss" in text and "0:00:00" in text


@pytest.mark.parametrize("when", ["step", "end of epoch"])
def test_nan_stops_with_plain_words_and_leaves_the_last_good_checkpoint(tmp_path, when):
    class Breaks(MLPVAE):
        steps = 0

        def training_step(self, x):
            losses = super().training_step(x)
            Breaks.steps += self.training
            return losses._replace(loss=losses.loss * math.nan) if Breaks.steps == 10 else losses

    torch.manual_seed(0)
    model = Breaks(64, 8, 2)
    config = dataclasses.replace(CONFIG, log_every=1 if when == "step" else 1000)
    at = "step 10" if when == "step" else "step 14"
    with pytest.raises(TrainingStopped, match=rf"stopped at {at} \(epoch 2\).* became nan.*smaller --lr"):
        fit(model, make_optimizer(model, config), *digits(), config, tmp_path, stream=io.StringIO())
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-000000007"]
