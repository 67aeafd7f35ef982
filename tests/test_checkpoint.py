"""Checkpoints: exact resume, real kills, broken and foreign files."""

import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from genai_fast import data
from genai_fast.models import MLPVAE
from genai_fast.training import CheckpointError, checkpoint, disk, environment, fit, loop, make_optimizer
from genai_fast.training.feed import ImageFeed
from genai_fast.training.settings import VAEConfig

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
    return [{k: v for k, v in line.items() if k not in ("samples_per_second", "data_wait")} for line in lines]


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
    with pytest.warns(UserWarning, match=rf"not bit for bit: threads: {threads} then, {threads + 1} now$"):
        checkpoint.restore(newest, *new(), threads=False)
    torch.set_num_threads(threads)
    edit(environment={**state["environment"], "isa": "sve2", "variables": {"MKL_CBWR": "AVX2"}})(newest)
    with pytest.warns(UserWarning, match="isa: sve2 then, .* variables: MKL_CBWR: AVX2 then, nothing now"):
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


def test_the_newest_and_the_best_are_kept_and_leftovers_go(tmp_path):
    (tmp_path / ".checkpoint-000000001.new").mkdir(parents=True)
    elsewhere = tmp_path.with_name("elsewhere")
    elsewhere.mkdir()
    (tmp_path / ".checkpoint-000000002.new").symlink_to(elsewhere)
    (tmp_path / "checkpoint-000000003").symlink_to(elsewhere)
    model, optimizer = new()
    for step, best in ((5, 0), (40, 0), (300, 40), (4000, 40), (10**10, 40)):
        checkpoint.save(tmp_path, model, optimizer, step, {}, {}, keep=2, best=best)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-000000040", "checkpoint-000004000", "checkpoint-10000000000",
    ]  # fmt: skip
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


class Evil:
    def __reduce__(self):
        return os._exit, (3,)


def replace_tensors(name, change):
    def to(path):
        found = safetensors.torch.load_file(path / name)
        change(found)
        safetensors.torch.save_file(found, path / name)
        state = checkpoint.read_state(path)
        edit(files={**state["files"], name: disk.digest(path / name)})(path)

    return to


def group(**values):
    def to(path):
        (one,) = checkpoint.read_state(path)["optimizer"]
        edit(optimizer=[{**one, **values}])(path)

    return to


def in_place_of(name, make):
    def to(path):
        (path / name).unlink()
        make(path / name)

    return to


def header(length, text):
    return lambda b: length.to_bytes(8, "little") + text


HUGE = b'{"a": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 8]}}'
WHOLE, STATE, BELONGS = (
    "expected a whole safetensors",
    "expected a checkpoint's state in JSON",
    "expected the file that",
)
MODEL, TRAINING = "model.safetensors", "training.safetensors"
BROKEN = {
    "truncated model": (rewrite(MODEL, lambda b: b[:-5]), rf"model\.safetensors: {WHOLE}"),
    "empty model": (rewrite(MODEL, lambda b: b""), rf"model\.safetensors: {WHOLE}"),
    "truncated optimizer": (rewrite(TRAINING, lambda b: b[:100]), rf"training\.safetensors: {WHOLE}"),
    "no model": (lambda p: (p / MODEL).unlink(), rf"model\.safetensors: {WHOLE} file, got no such file"),
    "a pipe": (in_place_of(MODEL, os.mkfifo), rf"model\.safetensors: {WHOLE} file, got something else"),
    "a link to nothing": (in_place_of(MODEL, lambda p: p.symlink_to("/no/where")), "got no such file"),
    "a folder": (in_place_of(TRAINING, Path.mkdir), rf"training\.safetensors: {WHOLE}"),
    "one bit": (rewrite(MODEL, lambda b: b[:-7] + bytes([b[-7] ^ 1]) + b[-6:]), rf"model\.safetensors: {BELONGS}"),
    "zeros": (rewrite(TRAINING, lambda b: b[:-999] + bytes(999)), rf"training\.safetensors: {BELONGS}"),
    "a header of 2^63 bytes": (rewrite(MODEL, header(2**63, b"{}")), f"{WHOLE}.*header too large"),
    "a header of 2^40 bytes": (rewrite(MODEL, header(2**40, b"{}")), f"{WHOLE}.*header too large"),
    "a header beyond the end": (rewrite(MODEL, header(10**7, b"{}")), f"{WHOLE}.*invalid header length"),
    "a header of brackets": (rewrite(MODEL, header(10**6, b"[" * 10**6)), f"{WHOLE}.*invalid"),
    "a tensor of 2^80 elements": (rewrite(MODEL, header(len(HUGE), HUGE + bytes(8))), f"{WHOLE}.*overflow"),
    "no state": (lambda p: (p / "state.json").unlink(), rf"state\.json: {STATE}, got no such file"),
    "a device as state": (
        in_place_of("state.json", lambda p: p.symlink_to("/dev/zero")),
        f"{STATE}, got something else",
    ),
    "truncated state": (rewrite("state.json", lambda b: b[:50]), rf"state\.json: {STATE}"),
    "binary state": (rewrite("state.json", lambda b: b"\xff\xfe\x00"), rf"state\.json: {STATE}"),
    "nested state": (rewrite("state.json", lambda b: b"[" * 10**5), rf"state\.json: {STATE}"),
    "NaN": (rewrite("state.json", lambda b: b.replace(b'"best": 0', b'"best": NaN')), "got NaN, which JSON does not"),
    "one figure": (rewrite("state.json", lambda b: b.replace(b'"lr": 0.001', b'"lr": 0.002')), "was changed since"),
    "foreign state": (rewrite("state.json", lambda b: b'{"model": 1}'), "expected a genai-fast checkpoint"),
    "list": (rewrite("state.json", lambda b: b"[1]"), "expected a genai-fast checkpoint"),
    "newer version": (edit(version=99), "expected version 2, got 99; remedy: read it with the genai_fast that"),
    "no optimizer": (edit(optimizer=None), "expected optimizer: list, got None"),
    "step in words": (edit(step="7"), "expected step: int, got 7"),
    "step of another": (edit(step=8), "got something that was changed since"),
    "best before all": (edit(best=-1), "expected steps >= 0"),
    "threads": (edit(environment={"threads": 10**9}), "threads: 1 to 4096, got 1000000000"),
    "threads in words": (edit(environment={"threads": "all"}), "threads: 1 to 4096, got all"),
    "paths": (edit(routes={"a": ["b"]}), "names of paths"),
    "pickled model": (rewrite(MODEL, lambda b: pickle.dumps(Evil())), WHOLE),
    "pickled state": (rewrite("state.json", lambda b: pickle.dumps(Evil())), STATE),
    "foreign tensors": (lambda p: safetensors.torch.save_file({"a": torch.ones(1)}, p / MODEL), BELONGS),
    "missing weight": (
        replace_tensors(MODEL, lambda t: t.pop("fc1.bias")),
        r"fc1\.bias: expected \(32,\) of float32 as MLPVAE has, got nothing",
    ),
    "dtype": (
        replace_tensors(MODEL, lambda t: t.update({"fc1.bias": t["fc1.bias"].double()})),
        r"fc1\.bias: expected \(32,\) of float32 as MLPVAE has, got \(32,\) of float64",
    ),
    "a way out": (
        replace_tensors(MODEL, lambda t: t.update({"../../fc1.bias": t.pop("fc1.bias")})),
        r"\.\./\.\./fc1\.bias: expected nothing as MLPVAE has",
    ),
    "moment's shape": (
        replace_tensors(TRAINING, lambda t: t.update({"optimizer.1.exp_avg": torch.ones(3)})),
        r"optimizer\.1\.exp_avg: \(32,\), got \(3,\)",
    ),
    "moment of none": (
        replace_tensors(TRAINING, lambda t: t.update({"optimizer.x.exp_avg": torch.ones(3)})),
        r"optimizer\.x\.exp_avg: no such tensor",
    ),
    "generator": (
        replace_tensors(TRAINING, lambda t: t.update({"rng.cpu": torch.ones(3)})),
        r"rng\.cpu: a generator's state",
    ),
    "no generator": (replace_tensors(TRAINING, lambda t: t.pop("rng.cpu")), r"rng\.cpu: a generator's state"),
    "device's generator": (
        replace_tensors(TRAINING, lambda t: t.update({"rng.cuda.one": torch.ones(3)})),
        r"rng\.cuda\.one: a generator's state",
    ),
    "rate in words": (group(lr="fast"), "optimizer: lr: such as 0.001, got fast"),
    "peak rate in words": (group(initial_lr=None), "optimizer: initial_lr: such as 1.0, got None"),
    "one beta": (group(betas=[0.9]), r"optimizer: betas: such as \(0.9, 0.999\), got \[0.9\]"),
    "infinite rate": (
        rewrite("state.json", lambda b: b.replace(b'"lr": 0.001', b'"lr": 1e999')),
        "something that was changed since|such as",
    ),
    "groups": (edit(optimizer=[3]), "expected an optimizer of 10 parameters in 1 groups, got 0 in 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_and_foreign_checkpoints_are_named(tmp_path, case):
    saved(tmp_path, 4)
    path, _, _ = saved(tmp_path)
    damage, message = BROKEN[case]
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.restore(path, *new())
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 1000
    if "remedy: remove" in str(error.value):
        assert re.search(
            r"remove \S+checkpoint-000000007; then the run goes on from checkpoint-000000004", str(error.value)
        )
        shutil.rmtree(path)
        checkpoint.restore(checkpoint.latest(tmp_path), *new())


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


PROGRESS = {
    "batch": {"batch": 10**6}, "negative": {"step": -1}, "words": {"epoch": "one"}, "half": {"epoch": 0.5},
    "sums": {"sums": 3}, "a sum": {"sums": [None]}, "unknown": {"weather": 1}, "another step": {"step": 8},
    "kinds": {"ailing": [1]}, "best": {"best": True}, "seconds": {"seconds": "1"},
}  # fmt: skip


@pytest.mark.parametrize("wrong", PROGRESS)
def test_progress_that_cannot_be_is_refused(tmp_path, wrong):
    model, optimizer = new()
    good = {"step": 7, "batch": 1, "epoch": 1, "seconds": 0.5, "sums": [1.0, 2.0, 3.0, 4.0]}
    path = checkpoint.save(tmp_path, model, optimizer, 7, {**good, **PROGRESS[wrong]}, {})
    before = [x.clone() for x in tensors(model, optimizer)]
    with pytest.raises(CheckpointError, match=r"progress: expected such as Progress\(.*, batch < 7, got \{"):
        train(tmp_path, model, optimizer, resume=checkpoint.restore(path, model, optimizer))
    assert same(tensors(model, optimizer), before)
