"""The loop: metrics, skipped steps, signals; the schedule and the optimizer of recipes."""

import dataclasses
import io
import itertools
import json
import math
import os
import signal
import threading
import time

import pytest
import safetensors.torch
import torch

from genai_fast import data
from genai_fast.models import MLPVAE
from genai_fast.models.autoencoder import AutoencoderLoss
from genai_fast.models.vae.settings import VAEConfig
from genai_fast.training import Step, checkpoint, loop, make_optimizer, progress
from genai_fast.training import step as step_module
from genai_fast.training.batches import ImageFeed
from genai_fast.training.loop import TrainingInterrupted, TrainingStopped, fit
from genai_fast.training.meter import Meter, Progress
from genai_fast.training.schedule import Schedule

CONFIG = VAEConfig(data="digits", epochs=2, batch_size=256, hidden=32, latent=4, log_every=3)


def new(seed=0, config=CONFIG, **adam):
    torch.manual_seed(seed)
    model = MLPVAE(64, config.hidden, config.latent)
    optimizer = torch.optim.Adam(model.parameters(), **adam) if adam else make_optimizer(model, config)
    return model, optimizer


def digits():
    return data.load("digits").split(0.1, seed=0)


def feeds(model, config=CONFIG):
    return [ImageFeed(model, images, config) for images in digits()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_optimizer_has_the_settings_rates():
    config = dataclasses.replace(CONFIG, lr=3e-4, beta1=0.5, beta2=0.9, weight_decay=0.1)
    model, optimizer = new(config=config)
    matrices, vectors = optimizer.param_groups
    assert matrices["betas"] == vectors["betas"] == (0.5, 0.9) and matrices["lr"] == 3e-4
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in matrices["params"]) and all(p.dim() == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_the_rate_rises_and_falls(kind):
    config = dataclasses.replace(CONFIG, lr=1.0, warmup=4, decay="cosine")
    rate = torch.tensor(1.0) if kind == "tensor" else 1.0
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule, rates = Schedule(optimizer, config, 44), []
    for step in range(45):
        schedule.set(step)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[24] == pytest.approx(0.55)
    assert rates[44] == pytest.approx(0.1)
    if kind == "tensor":
        assert optimizer.param_groups[0]["lr"] is rate  # as a captured graph reads it
    # A run that goes on has the rates of the run that never stopped.
    again = Schedule(optimizer, config, 44)
    again.set(2)
    assert float(optimizer.param_groups[0]["lr"]) == 0.75
    assert [Schedule(optimizer, config, 20).factor(k) for k in range(3)] == [0.5, 1.0, 1.0]  # a tenth of it


@pytest.mark.parametrize("steps", [1, 2, 9, 10])
def test_the_rate_stays_for_half_the_run_and_falls_to_nothing(steps):
    config = dataclasses.replace(CONFIG, lr=1.0, decay="linear")
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, rates = Schedule(optimizer, config, steps), []
    for step in range(steps):
        schedule.set(step)
        rates.append(optimizer.param_groups[0]["lr"])
    half = steps // 2
    assert rates[: half + 1] == [2.0] * (half + 1)
    assert rates[half:] == pytest.approx([2.0 * k / (steps - half) for k in range(steps - half, 0, -1)])
    assert schedule.factor(steps) == schedule.factor(steps + 5) == 0.0
    again = Schedule(optimizer, config, steps)  # of a resumed run: rates are relative to the peak, not to the last one
    again.set(0)
    assert optimizer.param_groups[0]["lr"] == 2.0


def run(tmp_path, config=CONFIG, stream=None, **new_arguments):
    model, optimizer = new(**new_arguments)
    return model, fit(model, optimizer, *feeds(model, config), config, tmp_path, stream=stream or io.StringIO())


def records(path):
    return [json.loads(line) for line in (path / loop.METRICS).read_text().splitlines()]


def test_a_line_comes_before_the_first_epoch_ends(monkeypatch):
    clock, stream = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Lines(stream, 100) as screen:
        screen.begin(1, 5)
        for seconds, done in ((1, 1), (4, 2), (20, 9), (40, 20)):
            clock[0] = seconds
            screen.step(done)
            screen.terms({"loss": 2.5}, {"samples_per_second": 7.0})
    shares = ("2.0%", "20.0%")
    assert stream.getvalue() == "".join(f"epoch 1/5  loss 2.50  7 samples/s  {share} of the run\n" for share in shares)


def test_metrics_and_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_FIRST", math.inf)
    stream = io.StringIO()
    _, last = run(tmp_path, stream=stream)
    found = records(tmp_path)
    steps, epochs = ([r for r in found if r["kind"] == kind] for kind in ("step", "epoch"))
    # 1617 images: 7 steps an epoch; a record every third step and at an epoch's end.
    assert [r["step"] for r in steps] == [3, 6, 7, 9, 12, 14]
    assert [(r["epoch"], r["step"]) for r in epochs] == [(1, 7), (2, 14)] and epochs[-1] == last
    common = {"kind", "epoch", "step", "samples_per_second", "data_wait"}
    assert all(set(r) == common | {"loss", "reconstruction", "kl"} for r in steps)
    for r in epochs:
        assert set(r["train"]) == set(r["validation"]) == {"loss", "reconstruction", "kl"}
        assert r["validation"]["loss"] == pytest.approx(r["validation"]["reconstruction"] + r["validation"]["kl"])
        assert r["samples_per_second"] > 0 and 0 < r["data_wait"] < 1 and r["skipped"] == 0 and r["warnings"] == []
        times = r["step_ms"]
        seconds = 1617 / r["samples_per_second"]
        assert 0 < times["p50"] <= times["p95"] <= times["max"] < 1e3 * seconds
    assert epochs[1]["train"]["loss"] < epochs[0]["train"]["loss"]
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and lines[1].startswith(f"epoch 2/2  loss {last['train']['loss']:.2f}  validation")


def test_the_wait_for_data_goes_on_across_a_resume():
    at = Progress(batch=3, step=3, seconds=100.0, waited=40.0, sums=[1.0, 1.0])
    meter = Meter(at, 0)
    assert meter.wait() == pytest.approx(0.4, abs=1e-3)

    def slow():
        yield (torch.zeros(1),)
        time.sleep(0.2)
        yield (torch.ones(1),)

    for (x,) in meter.waiting(slow()):
        meter.add(AutoencoderLoss(x[0]), 1)
    meter.store(at, 0)
    assert at.sums == [2.0, 3.0]
    assert 40.2 <= at.waited < 41 and 100.2 <= at.seconds < 101


def test_a_run_that_stops_leaves_no_thread(tmp_path, monkeypatch):
    """On CUDA batches come from a thread; here it is put in without."""
    made = []

    def threaded(*arguments):
        made.append(data.ahead(epoch(*arguments)))
        return made[-1]

    straight, _ = run(tmp_path)
    epoch = ImageFeed.epoch
    monkeypatch.setattr(ImageFeed, "epoch", threaded)
    assert equal(run(tmp_path)[0], straight)
    monkeypatch.setattr(Step, "__call__", lambda step, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)
    assert len(made) == 3 and not [t for t in threading.enumerate() if t.name == "genai_fast.data.ahead"]


def test_an_epochs_mean_weighs_samples_not_batches(tmp_path):
    class Counts(MLPVAE):
        def training_step(self, x):
            losses = super().training_step(x)
            return losses._replace(kl=losses.kl.detach() * 0 + len(x))

    torch.manual_seed(0)
    model = Counts(64, 8, 2)
    last = fit(model, make_optimizer(model, CONFIG), *feeds(model), CONFIG, tmp_path, stream=io.StringIO())
    assert last["train"]["kl"] == pytest.approx((6 * 256**2 + 81**2) / 1617)
    assert last["validation"]["kl"] == 180


def test_validation_has_its_own_noise_and_leaves_training_alone():
    model, _ = new()
    _, validation = feeds(model)
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


class Breaks(MLPVAE):
    """Its loss is NaN in the steps of `bad`, counted from 1."""

    bad = range(0)
    steps = 0

    def training_step(self, x):
        losses = super().training_step(x)
        self.steps += self.training
        return losses._replace(loss=losses.loss * math.nan) if self.training and self.steps in self.bad else losses


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path):
    x = digits()[0].batch(slice(0, 32))
    torch.manual_seed(0)
    model = Breaks(64, 8, 2)
    model.bad = range(2, 4)
    optimizer = make_optimizer(model, CONFIG)
    step, states = Step(model, optimizer), []
    for _ in range(4):
        step(x)
        held = [*model.parameters(), optimizer.state[model.fc1.weight]["step"]]
        states.append([x.detach().clone() for x in held])
    unchanged = [all(map(torch.equal, a, b)) for a, b in itertools.pairwise(states)]
    assert unchanged == [True, True, False] and step.skipped() == (2, 0)

    torch.manual_seed(0)
    model = Breaks(64, 8, 2)
    model.bad = range(9, 12)
    last = fit(model, make_optimizer(model, CONFIG), *feeds(model), CONFIG, tmp_path, stream=io.StringIO())
    first, second = [r for r in records(tmp_path) if r["kind"] == "epoch"]
    assert (first["skipped"], second["skipped"]) == (0, 3) and second == last
    assert second["train"]["loss"] < first["train"]["loss"]  # a mean of the steps that count
    assert [r["loss"] for r in records(tmp_path) if r["kind"] == "step" and r["step"] == 9] == [None]


def test_steps_that_stay_nan_stop_with_plain_words_the_batch_and_the_last_good_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = Breaks(64, 8, 2)
    model.bad = range(10, 1000)
    config = dataclasses.replace(CONFIG, epochs=9, log_every=1)
    with pytest.raises(TrainingStopped, match=r"stopped at step 19 \(epoch 3\): 10 steps in a row .*smaller --lr"):
        fit(model, make_optimizer(model, config), *feeds(model, config), config, tmp_path, stream=io.StringIO())
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{k:09d}" for k in (7, 14)]
    images = safetensors.torch.load_file(tmp_path / "batch-000000019.safetensors")["images"]
    assert images.shape == (256, 1, 8, 8) and images.isfinite().all()


def test_a_checkpoint_never_holds_nan(tmp_path):
    class Poisoned(MLPVAE):
        def training_step(self, x):
            losses = super().training_step(x)
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 3:
                self.fc1.bias.data[0] = math.nan  # no update has done it
            return losses

    torch.manual_seed(0)
    model = Poisoned(64, 8, 2)
    with pytest.raises(TrainingStopped, match=r"stopped at step 7 \(epoch 1\): fc1.*not finite"):
        fit(model, make_optimizer(model, CONFIG), *feeds(model), CONFIG, tmp_path, stream=io.StringIO())
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("when", ["step", "last step", "step in float16"])
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on_exactly(tmp_path, when, monkeypatch):
    config = dataclasses.replace(CONFIG, precision="float16" if "float16" in when else "float32")
    monkeypatch.setattr(step_module, "_SCALE", 2.0**19)  # so much that the first steps are skipped

    class Interrupted(MLPVAE):
        at = 7 if when == "last step" else 5
        steps = 0

        def training_step(self, x):
            self.steps += self.training
            if self.training and self.steps == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(x)

    torch.manual_seed(0)
    model = Interrupted(64, CONFIG.hidden, CONFIG.latent)
    optimizer = make_optimizer(model, CONFIG)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=rf"SIGINT after step {model.at} .*checkpoint.*--resume"):
        fit(model, optimizer, *feeds(model), config, tmp_path, stream=io.StringIO())
    assert signal.getsignal(signal.SIGINT) is before
    (saved,) = tmp_path.glob("checkpoint-*")
    assert saved.name == f"checkpoint-{model.at:09d}"

    resumed, its_optimizer = new(seed=9)
    state = checkpoint.restore(saved, resumed, its_optimizer)
    fit(resumed, its_optimizer, *feeds(resumed), config, tmp_path, resume=state, stream=io.StringIO())
    straight, adam = new()
    (tmp_path / "straight").mkdir()
    fit(straight, adam, *feeds(straight), config, tmp_path / "straight", stream=io.StringIO())
    assert equal(resumed, straight)
    if "float16" in when:
        assert 0 < next(r for r in records(tmp_path) if r["kind"] == "epoch")["skipped"] < model.at
