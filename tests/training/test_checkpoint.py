"""Checkpoints: exact resume, real kills, broken and foreign files."""

import io
import json
import os
import sys

import pytest
import torch

from genai_fast import backends, data
from genai_fast.models import MLPVAE
from genai_fast.models.vae.settings import VAEConfig
from genai_fast.training import CheckpointError, checkpoint, environment, fit, loop, make_optimizer
from genai_fast.training.batches import ImageFeed

CONFIG = VAEConfig(data="digits", epochs=2, batch_size=256, hidden=32, latent=4, log_every=2, checkpoint_every=3)


def new(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = MLPVAE(64, config.hidden, config.latent)
    return model, make_optimizer(model, config)


def train(folder, model, optimizer, resume=None, config=CONFIG, stream=None, after_epoch=None):
    folder.mkdir(exist_ok=True)
    feeds = [ImageFeed(model, images, config) for images in data.load("digits").split(0.1, seed=0)]
    stream = stream or io.StringIO()
    return fit(model, optimizer, *feeds, config, folder, resume=resume, stream=stream, after_epoch=after_epoch)


def tensors(model, optimizer):
    """Everything that a step changes."""
    state = optimizer.state_dict()["state"]
    moments = [state[index][name] for index in sorted(state) for name in sorted(state[index])]
    return [*model.state_dict().values(), *moments, torch.get_rng_state()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def without_clock(path):
    lines = [json.loads(line) for line in (path / loop.METRICS).read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("samples_per_second", "data_wait", "step_ms")} for line in lines
    ]


@pytest.fixture(autouse=True)
def threads():
    count = torch.get_num_threads()
    yield count
    torch.set_num_threads(count)


class Stop(BaseException):
    """What no one catches."""


@pytest.mark.parametrize("steps", [5, 7, 11, 13], ids=lambda n: f"after_step_{n}")
def test_an_interrupted_run_ends_bit_for_bit_as_a_straight_one(tmp_path, monkeypatch, steps):
    straight, its_optimizer = new()
    expected_record = train(tmp_path / "straight", straight, its_optimizer)
    expected = tensors(straight, its_optimizer)

    model, optimizer = new()
    done = 0

    def training_step(x):
        nonlocal done
        if model.training:
            done += 1
            if done > steps:
                raise Stop
        return MLPVAE.training_step(model, x)

    monkeypatch.setattr(model, "training_step", training_step)
    with pytest.raises(Stop):
        train(tmp_path / "run", model, optimizer)

    again, optimizer = new(seed=99)  # other weights: all must come from the checkpoint
    torch.rand(17)
    state = checkpoint.restore(checkpoint.latest(tmp_path / "run"), again, optimizer)
    assert 0 < state["step"] <= steps
    record = train(tmp_path / "run", again, optimizer, resume=state)
    assert same(tensors(again, optimizer), expected)
    assert {k: record[k] for k in ("train", "validation")} == {k: expected_record[k] for k in ("train", "validation")}
    assert without_clock(tmp_path / "run") == without_clock(tmp_path / "straight")


def test_a_checkpoint_says_where_it_ran_and_other_places_are_warned_of(tmp_path, threads):
    model, optimizer = new()
    train(tmp_path, model, optimizer)
    newest = checkpoint.latest(tmp_path)
    state = checkpoint.read_state(newest)
    assert state["environment"] == environment.environment(torch.device("cpu"))
    assert set(state["environment"]["backends"]) >= {"reparameterize", "vae_loss_backward"}
    torch.set_num_threads(threads + 1)
    checkpoint.restore(newest, *new())
    assert torch.get_num_threads() == threads  # restored, so nothing to warn of
    torch.set_num_threads(threads + 1)
    with pytest.warns(UserWarning, match=rf"no longer bit-exact: threads: {threads} then, {threads + 1} now$"):
        checkpoint.restore(newest, *new(), threads=False)
    torch.set_num_threads(threads)
    edit(environment={**state["environment"], "isa": "sve2", "variables": {"MKL_CBWR": "AVX2"}})(newest)
    with pytest.warns(UserWarning, match=r"isa: sve2 then, .* variables\.MKL_CBWR: AVX2 then, nothing now"):
        checkpoint.restore(newest, *new())


SWITCHES = {
    "algorithms": (
        lambda: torch.use_deterministic_algorithms(True),
        r"deterministic\.paths, deterministic\.algorithms: False then, True now",
    ),
    "precision": (
        lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
        r"precision\.mkldnn\.matmul: none then, bf16 now",
    ),
    "backend": (
        lambda: backends.use_backend("reference"),
        r".*backends\.\w+, .* and \d+ more: \w+ then, reference now",
    ),
    "variable": (lambda: os.environ.update(MKL_CBWR="AVX2"), r"variables\.MKL_CBWR: nothing then, AVX2 now$"),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_that_was_turned_is_warned_of(tmp_path, monkeypatch, switch):
    monkeypatch.setenv("MKL_CBWR", "")
    monkeypatch.delenv("MKL_CBWR")
    path, _, _ = saved(tmp_path)
    turn, message = SWITCHES[switch]
    try:
        turn()
        with pytest.warns(UserWarning, match=f"continues, but is no longer bit-exact: {message}"):
            checkpoint.restore(path, *new())
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        backends.use_backend(None)


def saved(tmp_path, step=7):
    model, optimizer = new()
    model.training_step(torch.rand(8, 1, 8, 8)).loss.backward()
    optimizer.step()
    return (checkpoint.save(tmp_path, model, optimizer, step, {"epoch": 1}, {"about": "this"}), model, optimizer)


def test_the_newest_and_the_best_are_kept_and_leftovers_go(tmp_path):
    (tmp_path / ".checkpoint-000000001.new").mkdir(parents=True)
    elsewhere = tmp_path.with_name("elsewhere")
    elsewhere.mkdir()
    (tmp_path / ".checkpoint-000000002.new").symlink_to(elsewhere)
    (tmp_path / "checkpoint-000000003").symlink_to(elsewhere)
    model, optimizer = new()
    for step, best in ((5, 0), (40, 0), (300, 40), (4000, 40), (10**10, 40)):
        checkpoint.save(tmp_path, model, optimizer, step, {}, {}, keep=2, best=best)
    assert {p.name for p in tmp_path.iterdir()} == {f"checkpoint-{step:09d}" for step in (40, 4000, 10**10)}
    assert elsewhere.is_dir()  # a link goes, not what it points to
    assert checkpoint.latest(tmp_path).name == "checkpoint-10000000000"
    assert checkpoint.best(tmp_path).name == "checkpoint-000000040"
    checkpoint.save(tmp_path, model, optimizer, 10**10 + 1, {}, {}, keep=1, best=10**10 + 1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-10000000001"]  # a new best: the old one goes
    assert checkpoint.best(tmp_path) == checkpoint.latest(tmp_path)


def test_the_best_is_named_or_said_to_be_missing(tmp_path):
    model, optimizer = new()
    checkpoint.save(tmp_path, model, optimizer, 5, {}, {})
    with pytest.raises(CheckpointError, match=r"expected a best checkpoint to be named, got none: .*take the newest"):
        checkpoint.best(tmp_path)
    checkpoint.save(tmp_path, model, optimizer, 6, {}, {}, best=4)
    with pytest.raises(CheckpointError, match="checkpoint-000000004: expected the best checkpoint, got nothing"):
        checkpoint.best(tmp_path)


def test_strided_and_shared_tensors_and_other_dtypes_survive(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.randn(4, 6).t())
            self.b = self.a
            self.register_buffer("count", torch.tensor(3))
            narrow = torch.randn(2, 3, 4, 4).to(torch.bfloat16, memory_format=torch.channels_last)
            self.register_buffer("narrow", narrow)

    model, other = Tied(), Tied()
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    model.a.sum().backward()
    optimizer.step()
    path = checkpoint.save(tmp_path, model, optimizer, 1, {}, {})
    adam = torch.optim.Adam(other.parameters(), amsgrad=True)
    checkpoint.restore(path, other, adam)
    assert same(tensors(model, optimizer), tensors(other, adam)) and other.a is other.b


def test_hyperparameters_come_back_and_the_way_of_execution_does_not(tmp_path):
    model, _ = new()
    path = checkpoint.save(tmp_path, model, torch.optim.Adam(model.parameters(), lr=0.5, fused=True), 1, {}, {})
    optimizer = torch.optim.Adam(new()[0].parameters(), lr=0.1, foreach=True)
    checkpoint.restore(path, model, optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["foreach"], group["fused"]) == (0.5, True, None)


@pytest.mark.parametrize("call", ["os.fsync", "os.rename", "shutil.rmtree", "safetensors.torch.save_file"])
def test_whatever_write_fails_an_older_checkpoint_stands(tmp_path, monkeypatch, call):
    owner, name = call.rsplit(".", 1)
    owner = sys.modules[owner]
    real = getattr(owner, name)
    for fatal in range(12):
        run = tmp_path / str(fatal)
        (run / ".checkpoint-000000000.new").mkdir(parents=True)
        for step in (1, 2):
            saved(run, step)
        calls = 0

        def failing(*arguments, fatal=fatal, **more):
            nonlocal calls
            calls += 1
            if calls == fatal + 1:
                raise Stop
            return real(*arguments, **more)

        monkeypatch.setattr(owner, name, failing)
        try:
            saved(run, 3)
        except Stop:
            pass
        else:
            assert fatal > 0  # every call has failed once
            break
        finally:
            monkeypatch.setattr(owner, name, real)
        newest = checkpoint.latest(run)
        assert newest.name in ("checkpoint-000000002", "checkpoint-000000003")
        checkpoint.restore(newest, *new())
        saved(run, 4)
        assert not list(run.glob(".checkpoint-*"))
    else:
        pytest.fail("more calls than were made to fail")


def rewrite(name, change):
    def to(path):
        file = path / name
        file.write_bytes(change(file.read_bytes()))

    return to


def edit(**values):
    """Other values in state.json, as one who knows its form would write them."""

    def change(raw):
        state = {**json.loads(raw), **values}
        return json.dumps({**state, "digest": checkpoint._digest(state)}).encode()

    return rewrite("state.json", change)
