"""Damaged, foreign and malicious checkpoints: named with a remedy, and nothing in them is executed."""

import dataclasses
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
from test_checkpoint import CONFIG, edit, new, rewrite, same, saved, tensors, train

from genai_fast import atomic_files
from genai_fast.errors import UsageError
from genai_fast.training import CheckpointError, Step, checkpoint
from genai_fast.training.meter import Metrics


class Evil:
    def __reduce__(self):
        return os._exit, (3,)


def replace_tensors(name, change):
    def to(path):
        found = safetensors.torch.load_file(path / name)
        change(found)
        safetensors.torch.save_file(found, path / name)
        state = checkpoint.read_state(path)
        edit(files={**state["files"], name: atomic_files.digest(path / name)})(path)

    return to


def group(**values):
    def to(path):
        (one,) = checkpoint.read_state(path)["optimizer"]
        edit(optimizer=[{**one, **values}])(path)

    return to


def without(key):
    def to(path):
        (one,) = checkpoint.read_state(path)["optimizer"]
        edit(optimizer=[{k: v for k, v in one.items() if k != key}])(path)

    return to


def in_place_of(name, make):
    def to(path):
        (path / name).unlink()
        make(path / name)

    return to


def header(length, text):
    return lambda b: length.to_bytes(8, "little") + text


HUGE = b'{"a": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 8]}}'
WHOLE, STATE = "expected a whole safetensors", "expected a checkpoint's state in JSON"
BELONGS = "expected the file that"
MODEL, TRAINING = "model.safetensors", "training.safetensors"


def put(file, name, value):
    return replace_tensors(file, lambda t: t.update({name: value}))


def drop(file, name):
    return replace_tensors(file, lambda t: t.pop(name))


ONES = torch.ones(3)
GENERATOR, MOMENT = "a generator's state", r"optimizer\.1\.exp_avg: expected \(32,\)"
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
    "deep about": (
        rewrite("state.json", lambda b: b.replace(b'"about": "this"', b'"about": ' + b"[" * 900 + b"]" * 900)),
        "state.json: expected",
    ),
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
    "missing weight": (drop(MODEL, "fc1.bias"), r"fc1\.bias: expected \(32,\) of float32 as MLPVAE has, got nothing"),
    "dtype": (
        replace_tensors(MODEL, lambda t: t.update({"fc1.bias": t["fc1.bias"].double()})),
        r"fc1\.bias: expected \(32,\) of float32 as MLPVAE has, got \(32,\) of float64",
    ),
    "a way out": (
        replace_tensors(MODEL, lambda t: t.update({"../../fc1.bias": t.pop("fc1.bias")})),
        r"\.\./\.\./fc1\.bias: expected nothing as MLPVAE has",
    ),
    "moment's shape": (put(TRAINING, "optimizer.1.exp_avg", ONES), rf"{MOMENT}, got \(3,\)"),
    "moment of none": (put(TRAINING, "optimizer.x.exp_avg", ONES), r"optimizer\.x\.exp_avg: expected no such tensor"),
    "generator": (put(TRAINING, "rng.cpu", ONES), rf"rng\.cpu: {GENERATOR}"),
    "no generator": (drop(TRAINING, "rng.cpu"), rf"rng\.cpu: {GENERATOR}"),
    "device's generator": (put(TRAINING, "rng.cuda.one", ONES), rf"rng\.cuda\.one: {GENERATOR}"),
    "rate in words": (group(lr="fast"), "optimizer: lr: expected such as 0.001, got fast"),
    "peak rate in words": (group(initial_lr=None), "optimizer: initial_lr: expected such as 1.0, got None"),
    "one beta": (group(betas=[0.9]), r"optimizer: betas: expected such as \(0.9, 0.999\), got \[0.9\]"),
    "infinite rate": (
        rewrite("state.json", lambda b: b.replace(b'"lr": 0.001', b'"lr": 1e999')),
        "something that was changed since|such as",
    ),
    "no rate": (without("lr"), "optimizer: expected lr, got none"),
    "no betas": (without("betas"), "optimizer: expected betas, got none"),
    "no count of steps": (drop(TRAINING, "optimizer.1.step"), r"optimizer\.1: expected step, got none"),
    "no moment": (drop(TRAINING, "optimizer.1.exp_avg_sq"), r"optimizer\.1: expected exp_avg_sq, got none"),
    "moment of one number": (put(TRAINING, "optimizer.1.exp_avg", ONES[0]), rf"{MOMENT}, got \(\)"),
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
            r"remove \S+checkpoint-000000007; then the run continues from checkpoint-000000004", str(error.value)
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


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied"), OSError(24, "Too many open files"), OSError(5, "Input/output error")],
)
def test_what_is_not_damage_is_never_to_be_removed(tmp_path, monkeypatch, error):
    path, _, _ = saved(tmp_path)

    def fail(*arguments):
        raise error

    monkeypatch.setattr(atomic_files, "open", fail, raising=False)
    with pytest.raises(OSError, match=error.strerror):
        checkpoint.restore(path, *new())
    with pytest.raises(OSError):
        checkpoint.load_matching(path / MODEL, new()[0])


def test_a_missing_package_is_said_and_not_taken_for_damage(tmp_path, monkeypatch):
    path, _, _ = saved(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for load, source in ((checkpoint.load_model, path), (checkpoint.load_matching, path / MODEL)):
        with pytest.raises(UsageError, match=r"safetensors does not import \(.*\); remedy: pip install") as caught:
            load(source, new()[0])
        assert "remove" not in str(caught.value)


@pytest.mark.parametrize("when", ["before", "in between"])
def test_a_checkpoint_that_another_process_removes_is_not_damaged(tmp_path, monkeypatch, when):
    path, _, _ = saved(tmp_path)
    if when == "before":
        shutil.rmtree(path)
    else:
        read = atomic_files.read_tensors
        monkeypatch.setattr(atomic_files, "read_tensors", lambda file: (shutil.rmtree(path), read(file))[1])
    with pytest.raises(CheckpointError, match=r"another process has removed it while it was read; remedy: run the com"):
        checkpoint.restore(path, *new())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_steps_state_that_cannot_be_is_refused(bad):
    model, optimizer = new()
    step = Step(model, optimizer)
    with pytest.raises(UsageError, match=r"state: skipped: expected finite numbers >= 0, got \["):
        step.load_state_dict({"skipped": torch.tensor([bad, 0.0])})
    assert step.skipped() == (0, 0)


def test_metrics_after_a_damaged_line_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step}) for step in (1, 2, 3, 9)]
    path.write_text("\n".join([good[0], "\x00\x00", good[1], "[" * 10**5, '"step"', good[2], good[3], good[0][:5]]))
    with Metrics(path, 3):
        pass
    assert path.read_text().splitlines() == good[:3]
