"""Runs that are killed, stopped, or out of disk: what stands, and that going on ends in the same bits."""

import contextlib
import dataclasses
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import traceback

import numpy as np
import pytest
import torch
from test_checkpoint import CONFIG, edit, new, same, tensors, train

from bench import kill
from bench.report import files
from genai_fast import atomic_files, autotune
from genai_fast.cli import parser
from genai_fast.models.vae.settings import VAEConfig
from genai_fast.runs import run
from genai_fast.training import checkpoint, loop, meter
from genai_fast.training.checkpoint import DiskError

pytestmark = pytest.mark.usefixtures("one_thread")
FORKS = pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA does not fork")
SMALL = ["--data", "digits", "--epochs", "3", "--batch-size", "512", "--hidden", "32", "--checkpoint-every", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments):
    return parser.main([str(x) for x in arguments])


def in_child(work):
    """Do work() in a child process; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed_at_line(number, work, *modules):
    """Whether work(), in a child that is killed at the so-manieth line of these modules, was killed before its end."""
    files, lines = {module.__file__ for module in modules}, 0

    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename not in files or frame.f_code.co_name[0] == "<":  # comprehensions write nothing
            return None
        lines += event == "line"
        if lines == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced():
        sys.settrace(trace)
        work()
        sys.settrace(None)

    status = in_child(traced)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@FORKS
def test_at_whatever_line_a_save_is_killed_a_whole_checkpoint_stands(tmp_path):
    model, optimizer = new()
    template, expected = tmp_path / "template", {}
    for step in (1, 2, 3, 4):
        with torch.no_grad():
            model.fc1.bias.fill_(step)
        expected[step] = [x.clone() for x in tensors(model, optimizer)]
        if step < 4:
            checkpoint.save(template, model, optimizer, step, {}, {}, best=1)
    (template / ".checkpoint-000000001.old").mkdir()
    again, adam = new(seed=9)
    line, ends, killed = 0, set(), True
    while killed:
        line, run = line + 1, tmp_path / "run"
        shutil.copytree(template, run)
        killed = killed_at_line(
            line, lambda run=run: checkpoint.save(run, model, optimizer, 4, {}, {}, best=1), checkpoint, atomic_files
        )
        ends.add(tuple(int(path.name[-9:]) for path in checkpoint.found(run)))
        newest = checkpoint.latest(run)
        checkpoint.restore(newest, again, adam)
        assert same(tensors(again, adam), expected[int(newest.name[-9:])])
        if list(run.glob(".*")):
            checkpoint.save(run, again, adam, 5, {}, {}, best=1)
            assert not list(run.glob(".*"))
        shutil.rmtree(run)
    assert ends == {(3, 2, 1), (4, 3, 2, 1), (4, 3, 1)} and line > 60


@FORKS
def test_a_run_killed_at_any_line_ends_as_one_never_killed(tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    train(straight, *new())

    def go_on():
        model, optimizer = new()
        newest = next(iter(checkpoint.found(run)), None)
        state = checkpoint.restore(newest, model, optimizer) if newest else None
        train(run, model, optimizer, resume=state)

    draw = random.Random(0)
    kills = sum(killed_at_line(draw.randint(1, 1200), go_on, loop, meter, checkpoint, atomic_files) for _ in range(8))
    assert kills > 3
    assert in_child(go_on) == 0
    assert kill.differences(straight, run) == []


@pytest.mark.parametrize(("recipe", "moments"), [("vae", ["save"]), ("lstm", ["step"])])
def test_killed_processes_end_as_one_never_killed(tmp_path, recipe, moments):
    assert kill.survive(recipe, moments, 3, tmp_path) == []


def test_a_run_without_a_checkpoint_is_begun_anew_and_that_is_said(here, capsys, monkeypatch):
    def interrupt(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", interrupt)
        assert call("train", "vae", *SMALL, "--run", "killed") == 130
    assert call("train", "vae", *SMALL, "--run", "straight") == 0
    capsys.readouterr()
    assert call("train", "vae", "--run", "killed", "--resume") == 0
    said = capsys.readouterr().err
    assert said.startswith("runs/killed: stopped before its first checkpoint; starting again\n")
    assert kill.differences(here / "runs" / "straight", here / "runs" / "killed") == []


def test_two_processes_do_not_train_in_one_folder(here, capsys):
    assert call("train", "vae", *SMALL, "--run", "a") == 0
    going_on = ("train", "vae", "--run", "a", "--resume", "--epochs", "4")
    code = "import sys; from pathlib import Path; from genai_fast.atomic_files import held\n"
    code += "with held(Path(sys.argv[1])): print('inside', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(here / "runs" / "a")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen(command, **pipes, text=True, cwd=files.ROOT)
    assert holder.stdout.readline() == "inside\n"
    before = {p: p.read_bytes() for p in (here / "runs" / "a").rglob("*") if p.is_file()}
    assert call(*going_on) == 2
    assert "another process trains in it; remedy: wait" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (here / "runs" / "a").rglob("*") if p.is_file()}
    holder.kill()  # its lock goes with it
    holder.wait()
    assert call(*going_on) == 0


def test_a_job_that_names_another_run_to_begin_with_may_be_started_again(here):
    assert call("train", "vae", *SMALL, "--run", "a") == 0
    assert call("train", "vae", *SMALL, "--run", "b", "--init", "a") == 0
    assert call("train", "vae", *SMALL, "--run", "b", "--init", "a", "--resume") == 0


def test_a_damaged_newest_checkpoint_is_named_with_the_one_to_go_on_from(here, capsys):
    for name in ("straight", "damaged"):
        assert call("train", "vae", *SMALL, "--run", name) == 0
    newest, before = checkpoint.found(here / "runs" / "damaged")
    (newest / "training.safetensors").write_bytes(b"\x80\x04")
    capsys.readouterr()
    assert call("train", "vae", "--run", "damaged", "--resume") == 2
    said = capsys.readouterr().err
    assert said.endswith(f"remedy: remove runs/damaged/{newest.name}; then the run continues from {before.name}\n")
    assert call("sample", "damaged", "--out", "a.png") == 0  # it needs the weights alone
    shutil.rmtree(newest)
    assert call("train", "vae", "--run", "damaged", "--resume") == 0
    assert kill.differences(here / "runs" / "straight", here / "runs" / "damaged") == []


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("ignored", [False, True], ids=["", "ignored"])
def test_signals_stop_with_their_exit_code_and_only_nohup_is_heeded(here, capsys, monkeypatch, name, ignored):
    number, step = getattr(signal, name), loop.Step.__call__
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)

    def signalled(self, *batch):
        os.kill(os.getpid(), number)
        return step(self, *batch)

    monkeypatch.setattr(loop.Step, "__call__", signalled)
    try:
        code = call("train", "vae", *SMALL, "--run", "a")
    finally:
        assert signal.signal(number, before) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    said = capsys.readouterr().err
    if ignored and name == "SIGHUP":
        assert code == 0
    else:
        assert code == 128 + number and f"stopped by {name} after step 1 (epoch 1) with a checkpoint" in said
        assert [p.name for p in checkpoint.found(here / "runs" / "a")] == ["checkpoint-000000001"]


def test_what_ails_a_model_twice_is_recorded_in_a_resumed_run_too(tmp_path):
    def after_epoch(epoch, means):
        return loop.Look({}, ["mode collapse: again", "not finite: loss"] if epoch < 3 else [])

    def go(folder, epochs, resume=None):
        model, optimizer = new()
        state = checkpoint.restore(resume, model, optimizer) if resume else None
        config = dataclasses.replace(CONFIG, epochs=epochs)
        train(folder, model, optimizer, resume=state, config=config, after_epoch=after_epoch)

    go(tmp_path / "straight", 3)
    for epochs in (1, 2, 3):
        go(tmp_path / "run", epochs, checkpoint.latest(tmp_path / "run") if epochs > 1 else None)
    records = [r for r in kill.metrics(tmp_path / "run") if r["kind"] == "epoch"]
    assert records == [r for r in kill.metrics(tmp_path / "straight") if r["kind"] == "epoch"]
    both = ["mode collapse: again", "not finite: loss"]
    assert [r["warnings"] for r in records] == [both[1:], both, []]


@pytest.mark.parametrize("figure", ["loss", "frechet_distance"])
def test_the_best_epoch_is_the_one_with_the_lowest_figure(tmp_path, figure):
    values = iter([3.0, float("nan"), 1.0, None, 1.0, 2.0])

    def after_epoch(epoch, means):
        value = next(values)
        return loop.Look({} if value is None else {figure: value, "kl": -1.0}, [])

    config = dataclasses.replace(CONFIG, epochs=3, checkpoint_every=0, keep=1)
    model, optimizer = new()
    train(tmp_path, model, optimizer, config=config, after_epoch=after_epoch)
    again, adam = new()
    state = checkpoint.restore(checkpoint.latest(tmp_path), again, adam)
    train(tmp_path, again, adam, resume=state, config=dataclasses.replace(config, epochs=6), after_epoch=after_epoch)
    assert [r["best"] for r in kill.metrics(tmp_path) if r["kind"] == "epoch"] == [7, 7, 21, 21, 21, 21]
    assert [p.name for p in checkpoint.found(tmp_path)] == ["checkpoint-000000042", "checkpoint-000000021"]
    assert checkpoint.best(tmp_path).name == "checkpoint-000000021"


def test_commands_take_the_best_checkpoint_where_asked_to(here):
    assert call("train", "vae", *SMALL, "--run", "a") == 0
    newest, before = checkpoint.found(here / "runs" / "a")
    edit(best=int(before.name[-9:]))(newest)
    for flags, source in (([], newest), (["--best"], before)):
        assert call("export", "a", "--out", "w.safetensors", *flags) == 0
        a, b = (atomic_files.read_tensors(path) for path in (here / "w.safetensors", source / "model.safetensors"))
        assert same(list(a.values()), [b[k] for k in a])


def test_paths_go_with_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_clock", lambda device, call: call())
    autotune.forget()
    autotune._warn_once.cache_clear()
    cpu = torch.device("cpu")

    def choose(key, **seconds):
        makers = {name: lambda t=t: lambda: t for name, t in seconds.items()}
        return autotune.choose((key,), (), cpu, lambda: (makers, "slow")).name

    assert (choose("a", slow=2, fast=1), choose("b", slow=2, fast=1)) == ("fast", "fast")
    model, optimizer = new()
    saved = checkpoint.save(tmp_path / "run", model, optimizer, 1, {}, {})
    assert checkpoint.read_state(saved)["routes"] == {"a": "fast", "b": "fast"}

    autotune.forget()  # another process, with a file in which it is the other way round
    shutil.rmtree(tmp_path / "cache")
    assert choose("a", slow=1, fast=2) == "slow"
    checkpoint.restore(saved, *new())
    assert choose("a", slow=1, fast=2) == "fast"
    second = checkpoint.save(tmp_path / "run", model, optimizer, 2, {}, {})
    assert checkpoint.read_state(second)["routes"] == {"a": "fast", "b": "fast"}  # b was not called for yet
    with pytest.warns(autotune.AutotuneWarning, match="b: the resumed run used fast, which is not available here"):
        assert choose("b", slow=1, slower=2) == "slow"

    monkeypatch.setenv("GENAI_FAST_DETERMINISTIC", "1")
    with pytest.warns(UserWarning, match=r"deterministic\.paths: False then, True now"):
        checkpoint.restore(saved, *new())
    autotune.forget()


@contextlib.contextmanager
def mounted(folder, options):
    """A small disk of its own."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def whole(run):
    """No half of anything lies in a run's folder."""
    for path in checkpoint.found(run):
        checkpoint.restore(path, *new(SETTINGS))
    return not list(run.glob(".*"))


SETTINGS = VAEConfig(
    data="digits", epochs=3, batch_size=512, hidden=256, latent=4, checkpoint_every=1, log_every=1, keep=9, threads=1
)


def test_a_full_disk_is_named_and_what_was_saved_stands(tmp_path):
    with mounted(tmp_path / "disk", "size=2m") as disk:
        folder = disk / "run"
        named = rf"run: cannot be written to: No space left on device \([\d.]+ MB free on the disk at {disk}\)"
        with pytest.raises(
            DiskError,
            match=rf"{named}; checkpoint-\d{{8}}[1-9] stands; remedy: .*train vae --run run --out {disk} --resume",
        ):
            run.train("vae", SETTINGS, folder)
        assert checkpoint.found(folder) and whole(folder)
        with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        config, newest = (folder / run.CONFIG).read_text(), checkpoint.latest(folder).name
        with pytest.raises(DiskError, match=f"{newest} stands"):
            run.train("vae", SETTINGS, folder, resume=True)
        assert (folder / run.CONFIG).read_text() == config and whole(folder)
        with pytest.raises(DiskError, match=r"other: cannot be written to: .* there is no checkpoint yet"):
            run.train("vae", SETTINGS, disk / "other")
        assert not list(disk.glob("other/*"))
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        run.train("vae", SETTINGS, folder, resume=True)
        run.train("vae", SETTINGS, tmp_path / "straight")
        assert kill.differences(tmp_path / "straight", folder) == []


def test_a_disk_that_cannot_be_written_to_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call("train", "vae", *SMALL, "--out", tmp_path / "file", "--run", "a") == 2
    said = capsys.readouterr().err
    assert "file/a: cannot be written to: Not a directory (" in said and said.count("\n") == 1
    assert call("train", "vae", *SMALL, "--out", tmp_path, "--run", "file") == 2
    assert "file: cannot be written to: File exists (" in capsys.readouterr().err
    with mounted(tmp_path / "disk", "ro") as read_only:
        assert call("train", "vae", *SMALL, "--out", read_only, "--run", "a") == 2
        assert "a: cannot be written to: Read-only file system (" in capsys.readouterr().err


@FORKS
def test_a_checkpoint_cut_off_by_a_limit_leaves_nothing(tmp_path):
    model, optimizer = new(SETTINGS)
    checkpoint.save(tmp_path, model, optimizer, 1, {}, {})

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        with pytest.raises(DiskError, match=r"File too large .*; checkpoint-000000001 stands"):
            checkpoint.save(tmp_path, model, optimizer, 2, {}, {})

    assert in_child(work) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000000001"] and whole(tmp_path)


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("error", [BrokenPipeError, OSError(5, "Input/output error"), ValueError("closed file")])
def test_a_stream_that_is_gone_ends_the_display_and_not_the_run(tmp_path, terminal, error):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

        def isatty(self):
            return terminal

    train(tmp_path, *new(), stream=Gone())
    assert checkpoint.latest(tmp_path).name == "checkpoint-000000014"


def command(folder, *arguments, **how):
    source = {**os.environ, "PYTHONPATH": str(files.ROOT)}
    return subprocess.Popen([sys.executable, "-m", "genai_fast", *arguments], cwd=folder, env=source, **how)


def test_a_reader_that_dies_costs_nothing(tmp_path):
    process = command(tmp_path, "train", "vae", *SMALL, "--run", "a", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    assert process.wait(300) == 0
    assert checkpoint.latest(tmp_path / "runs" / "a").name == "checkpoint-000000012"


def test_a_closed_terminal_stops_a_run_as_its_signal_says(tmp_path):
    leader, follower = os.openpty()
    how = {"stdin": follower, "stdout": follower, "stderr": follower, "start_new_session": True}
    process = command(tmp_path, "train", "vae", *SMALL[:3], "999", *SMALL[4:], "--run", "a", **how)
    os.close(follower)
    while not list(tmp_path.glob("runs/a/checkpoint-*")):
        assert process.poll() is None and os.read(leader, 4096)
    os.close(leader)
    process.send_signal(signal.SIGHUP)  # which a controlling terminal sends
    assert process.wait(300) == 128 + signal.SIGHUP


def test_two_new_runs_of_one_name_cannot_meet(tmp_path, monkeypatch, capsys):
    """The second looks for a run before the first has written one, and again when it has the folder."""
    monkeypatch.chdir(tmp_path)
    made = run._made

    def slow(name, task):
        if not (tmp_path / "runs" / "a").exists():
            monkeypatch.setattr(run, "_made", made)
            assert call("train", "vae", *SMALL, "--run", "a", "--seed", "1") == 0
        return made(name, task)

    monkeypatch.setattr(run, "_made", slow)
    assert call("train", "vae", *SMALL, "--run", "a", "--seed", "2") == 2
    assert "a run of this name exists" in capsys.readouterr().err
    assert "seed = 1\n" in (tmp_path / "runs" / "a" / run.CONFIG).read_text()


def test_a_run_that_goes_on_has_its_folder_before_it_reads_it(here, monkeypatch):
    assert call("train", "vae", *SMALL, "--run", "a") == 0
    restore = checkpoint.restore

    def meddled(*arguments, **more):
        with pytest.raises(ValueError, match="another process trains in it"), atomic_files.held(here / "runs" / "a"):
            pass
        return restore(*arguments, **more)

    monkeypatch.setattr(checkpoint, "restore", meddled)
    assert call("train", "vae", "--run", "a", "--resume", "--epochs", "4") == 0


@pytest.mark.parametrize("labels", [False, True])
def test_other_contents_of_the_data_are_noticed(here, capsys, labels):
    pixels, classes = np.random.default_rng(0).integers(0, 256, (60, 4, 4), np.uint8), np.arange(60) % 3
    flags = ("--epochs", "1", "--batch-size", "16", "--hidden", "8", "--run", "r")
    np.savez(here / "a.npz", images=pixels, labels=classes)
    assert call("train", "vae", "--data", "a.npz", *flags) == 0
    np.savez(here / "a.npz", images=pixels if labels else 255 - pixels, labels=classes[::-1] if labels else classes)
    assert call("train", "vae", "--run", "r", "--resume", "--epochs", "2") == 2
    assert "with other contents" in capsys.readouterr().err
    np.savez(here / "a.npz", images=pixels, labels=classes)
    assert call("train", "vae", "--run", "r", "--resume", "--epochs", "2") == 0
    newest = checkpoint.latest(here / "runs" / "r")  # as an earlier version wrote it
    edit(about={k: v for k, v in checkpoint.read_state(newest)["about"].items() if k != "data"})(newest)
    assert call("train", "vae", "--run", "r", "--resume", "--epochs", "3") == 0
