"""Checkpoints: exact resume, real kills, broken and foreign files."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import genai_fast
from genai_fast import data
from genai_fast.models import MLPVAE
from genai_fast.training import CheckpointError, checkpoint, fit, loop, make_optimizer
from genai_fast.training.feed import ImageFeed
from genai_fast.training.settings import VAEConfig

CONFIG = VAEConfig(data="digits", epochs=2, batch_size=256, hidden=32, latent=4, log_every=2, checkpoint_every=3)


def new(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = MLPVAE(64, config.hidden, config.latent)
    return model, make_optimizer(model, config)


def train(folder, model, optimizer, resume=None, config=CONFIG):
    folder.mkdir(exist_ok=True)
    feeds = [ImageFeed(model, images, config) for images in data.load("digits").split(0.1, seed=0)]
    return fit(model, optimizer, *feeds, config, folder, resume=resume, stream=io.StringIO())


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
    assert state["environment"] == checkpoint.environment(torch.device("cpu"))
    assert set(state["environment"]["backends"]) >= {"reparameterize", "vae_loss_backward"}
    torch.set_num_threads(threads + 1)
    checkpoint.restore(newest, *new())
    assert torch.get_num_threads() == threads  # restored, so nothing to warn of
    torch.set_num_threads(threads + 1)
    with pytest.warns(UserWarning, match=rf"not bit for bit: threads: {threads} then, {threads + 1} now$"):
        checkpoint.restore(newest, *new(), threads=False)
    torch.set_num_threads(threads)
    state["environment"]["isa"] = "sve2"
    (newest / "state.json").write_text(json.dumps(state))
    with pytest.warns(UserWarning, match="isa: sve2 then"):
        checkpoint.restore(newest, *new())


def saved(tmp_path, step=7):
    model, optimizer = new()
    model.training_step(torch.rand(8, 1, 8, 8)).loss.backward()
    optimizer.step()
    return (
        checkpoint.save(tmp_path, model, optimizer, step, {"epoch": 1}, {"about": "this"}),
        model,
        optimizer,
    )


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path):
    (tmp_path / ".checkpoint-000000001.new").mkdir(parents=True)
    for step in (5, 40, 300):
        saved(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000000040", "checkpoint-000000300"]
    assert checkpoint.latest(tmp_path).name == "checkpoint-000000300"


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


CHILD = """
import sys
from pathlib import Path
from genai_fast.training.settings import VAEConfig
from genai_fast.training.runs import train
settings = VAEConfig(data="digits", epochs=10**6, batch_size=512, hidden=4000,
                     latent=4, checkpoint_every=1, threads=1)
train("vae", settings, Path(sys.argv[1]), resume=sys.argv[2] == "resume")
"""


def step_of_newest(run: Path) -> int:
    return max((int(p.name[-9:]) for p in run.glob("checkpoint-*")), default=0)


def test_a_killed_process_leaves_a_checkpoint_from_which_the_next_goes_on(tmp_path):
    run, before = tmp_path / "run", 0
    environment = {**os.environ, "PYTHONPATH": str(Path(genai_fast.__file__).parents[1])}
    for prefix in (".checkpoint", "checkpoint"):  # killed in the midst of a write, and as its result appears
        mode = "resume" if before else "new"
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(run), mode], env=environment, stderr=subprocess.PIPE, text=True
        )
        try:
            while process.poll() is None and step_of_newest(run) <= before + 2:
                time.sleep(0.01)
            known = {name for name in os.listdir(run) if not name.endswith(".new")}
            while process.poll() is None:
                if any(n.startswith(prefix) and n not in known and n[-4:] != ".old" for n in os.listdir(run)):
                    os.kill(process.pid, signal.SIGSTOP)
                    time.sleep(0.01)  # it stops a moment later
                    if prefix == "checkpoint" or list(run.glob(".checkpoint-*.new")):
                        break
                    os.kill(process.pid, signal.SIGCONT)
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            error = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, error
        newest = checkpoint.latest(run)
        model = MLPVAE(64, 4000, 4)
        state = checkpoint.restore(newest, model, make_optimizer(model, CONFIG))
        assert state["step"] > before + 2 and state["progress"]["step"] == state["step"]
        before = state["step"]


def rewrite(name, change):
    def to(path):
        file = path / name
        file.write_bytes(change(file.read_bytes()))

    return to


def edit(**values):
    def change(raw):
        return json.dumps({**json.loads(raw), **values}).encode()

    return rewrite("state.json", change)


class Evil:
    def __reduce__(self):
        return os._exit, (3,)


def replace_tensors(name, change):
    def to(path):
        found = safetensors.torch.load_file(path / name)
        change(found)
        safetensors.torch.save_file(found, path / name, {"genai_fast_step": "7"})

    return to


BROKEN = {
    "truncated model": (
        rewrite("model.safetensors", lambda b: b[:-5]),
        r"model\.safetensors: expected a whole",
    ),
    "empty model": (rewrite("model.safetensors", lambda b: b""), r"model\.safetensors: expected a whole"),
    "truncated optimizer": (
        rewrite("training.safetensors", lambda b: b[:100]),
        r"training\.safetensors: expected a whole",
    ),
    "no model": (lambda p: (p / "model.safetensors").unlink(), r"model\.safetensors: expected a whole"),
    "no state": (lambda p: (p / "state.json").unlink(), r"state\.json: expected a checkpoint's state"),
    "truncated state": (rewrite("state.json", lambda b: b[:50]), r"state\.json: expected JSON"),
    "binary state": (rewrite("state.json", lambda b: b"\xff\xfe\x00"), r"state\.json: expected JSON"),
    "foreign state": (rewrite("state.json", lambda b: b'{"model": 1}'), "expected a genai-fast checkpoint"),
    "list": (rewrite("state.json", lambda b: b"[1]"), "expected a genai-fast checkpoint"),
    "newer version": (edit(version=99), "expected version 1, got 99; remedy"),
    "no optimizer": (
        rewrite("state.json", lambda b: b.replace(b'"optimizer"', b'"o"')),
        "expected optimizer in it",
    ),
    "pickled model": (
        rewrite("model.safetensors", lambda b: pickle.dumps(Evil())),
        "expected a whole safetensors file",
    ),
    "pickled state": (rewrite("state.json", lambda b: pickle.dumps(Evil())), "expected JSON"),
    "foreign tensors": (
        lambda p: safetensors.torch.save_file({"a": torch.ones(1)}, p / "model.safetensors"),
        "expected tensors of step 7, got step None",
    ),
    "other step": (edit(step=8), "expected tensors of step 8, got step 7"),
    "missing weight": (
        replace_tensors("model.safetensors", lambda t: t.pop("fc1.bias")),
        r"fc1\.bias: expected \(32,\) as MLPVAE has, got nothing",
    ),
    "moment's shape": (
        replace_tensors("training.safetensors", lambda t: t.update({"optimizer.1.exp_avg": torch.ones(3)})),
        r"optimizer\.1\.exp_avg: expected \(32,\), got \(3,\)",
    ),
    "moment of none": (
        replace_tensors("training.safetensors", lambda t: t.update({"optimizer.x.exp_avg": torch.ones(3)})),
        r"optimizer\.x\.exp_avg: expected no such tensor",
    ),
    "generator": (
        replace_tensors("training.safetensors", lambda t: t.update({"rng.cpu": torch.ones(3)})),
        r"rng\.cpu: expected a generator's state",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_and_foreign_checkpoints_are_named(tmp_path, case):
    path, _, _ = saved(tmp_path)
    damage, message = BROKEN[case]
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.restore(path, *new())
    assert str(tmp_path) in str(error.value)


def test_a_model_of_another_size_is_refused_before_anything_changes(tmp_path):
    path, _, _ = saved(tmp_path)
    model, optimizer = new(dataclasses.replace(CONFIG, latent=5))
    before = [x.clone() for x in tensors(model, optimizer)]
    with pytest.raises(CheckpointError, match=r"expected \(5,\).* got \(4,\)|expected \(5, 32\).*got \(4, 32\)"):
        checkpoint.load_model(path, model)
    with pytest.raises(CheckpointError):
        checkpoint.restore(path, model, optimizer)
    assert same(tensors(model, optimizer), before)


def test_other_optimizers_and_empty_folders_are_refused(tmp_path):
    path, model, _ = saved(tmp_path)
    with pytest.raises(CheckpointError, match="expected an optimizer of 2 parameters in 1 groups, got 10 in 1"):
        checkpoint.restore(path, model, torch.optim.Adam(model.fc1.parameters()))
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="expected a run with checkpoint-<step> folders, got none"):
        checkpoint.latest(tmp_path)
    with pytest.raises(CheckpointError, match="expected a run with"):
        checkpoint.latest(tmp_path / "nowhere")
