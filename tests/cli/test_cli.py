"""The command line, from training to pictures, and what it says of mistakes."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call, records
from PIL import Image

import genai_fast
from genai_fast import config, data, terminal
from genai_fast.cli import demo, parser, tune
from genai_fast.models import registry
from genai_fast.models.vae.settings import VAEConfig
from genai_fast.profiling import loops
from genai_fast.runs import image_evaluation, run
from genai_fast.training import Step, loop

SMALL = ["--data", "digits", "--epochs", "2", "--batch-size", "512", "--hidden", "32"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def test_train_sample_and_resume(here, capsys):
    assert call("train", "vae", *SMALL, "--latent", "2", "--run", "one", "--seed", "3") == 0
    run = here / "runs" / "one"
    names = {p.name for p in run.iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "samples.png", "reconstructions.png", "latent.png"}
    assert any(n.startswith("checkpoint-") for n in names)
    settings = tomllib.loads((run / "config.toml").read_text())
    assert (settings["recipe"], settings["seed"], settings["latent"], settings["lr"]) == ("vae", 3, 2, 1e-3)
    assert f"next: {terminal.command('sample', 'runs/one', '--count', 64)}" in capsys.readouterr().out

    assert call("sample", "one", "--count", "10", "--seed", "4", "--out", "a.png") == 0
    assert call("sample", str(run), "--count", "10", "--seed", "4", "--out", "b.png") == 0
    assert call("sample", "one", "--count", "10", "--seed", "5", "--out", "c.png") == 0
    a, b, c = (np.asarray(Image.open(here / n)) for n in ("a.png", "b.png", "c.png"))
    assert a.shape == (3 * 34 + 2, 4 * 34 + 2)  # 10 images in 4 columns, 8 x 8 enlarged to 32 x 32
    assert (a == b).all() and (a != c).any()

    assert call("train", "vae", "--run", "one", "--resume", "--epochs", "3") == 0
    lines = map(json.loads, (run / loop.METRICS).read_text().splitlines())
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2, 3]
    assert tomllib.loads((run / "config.toml").read_text())["epochs"] == 3


def test_resuming_is_training_on(here):
    assert call("train", "vae", *SMALL, "--run", "straight") == 0
    assert call("train", "vae", *SMALL[:2], *SMALL[4:], "--epochs", "1", "--run", "twice") == 0
    assert call("train", "vae", "--run", "twice", "--resume", "--epochs", "2") == 0
    for name in ("samples.png", "reconstructions.png"):
        a, b = (np.asarray(Image.open(here / "runs" / run / name)) for run in ("straight", "twice"))
        assert (a == b).all(), name


def test_a_batch_in_parts_is_one_step(here):
    """A dense autoencoder would be exact; a VAE's noise is another in each part, so its loss is near."""
    for name, more in (("whole", []), ("parts", ["--accumulate", "3"])):
        assert call("train", "vae", *SMALL, "--run", name, *more) == 0
    whole, parts = (records(here / "runs" / name) for name in ("whole", "parts"))
    assert [r["step"] for r in whole] == [r["step"] for r in parts]
    assert whole != parts and parts[-1]["train"]["loss"] == pytest.approx(whole[-1]["train"]["loss"], rel=0.02)


def test_float32_products_are_as_they_were_behind_a_run(monkeypatch):
    """On CUDA; its switches are there without one."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    monkeypatch.setattr(run, "device_of", lambda name: torch.device("cuda"))
    with run._products(VAEConfig(tf32=True)):
        assert switch.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert switch.fp32_precision == before


def test_pictures_show_what_they_should(here):
    images = data.load("digits")
    train, validation = images.split(0.1, seed=0)
    torch.manual_seed(0)
    model = registry.make("vae", VAEConfig(latent=2), images.shape, 0)
    image_evaluation.draw(model, train, validation, here)
    sheet = torch.from_numpy(np.array(Image.open(here / "reconstructions.png")))
    assert sheet.shape == (2 * 34 + 2, 12 * 34 + 2)
    first = sheet[2:34:4, 2:34:4] / 255
    torch.testing.assert_close(first, validation.batch(slice(0, 1))[0, 0], atol=1 / 255, rtol=0)
    colours = np.unique(np.asarray(Image.open(here / "latent.png").convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colours) > 20  # ten classes, their blends, axes


def test_names_of_runs(here):
    for expected in ("vae-digits", "vae-digits-2"):
        assert call("train", "vae", *SMALL, "--epochs", "1") == 0
        assert (here / "runs" / expected / "config.toml").exists()


def test_flags_go_over_the_file(here):
    (here / "a.toml").write_text('data = "digits"\nepochs = 1\nhidden = 16\nlatent = 3\n')
    assert call("train", "vae", "--config", "a.toml", "--latent", "4", "--run", "r", "--out", "elsewhere") == 0
    settings = tomllib.loads((here / "elsewhere" / "r" / "config.toml").read_text())
    assert (settings["hidden"], settings["latent"]) == (16, 4)


def test_alone_it_says_what_to_begin_with(capsys, monkeypatch):
    monkeypatch.setattr(parser, "command", lambda *words: "genai-fast")
    assert call() == 0
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert genai_fast.__version__ in first and all(len(line) <= 80 for line in lines)
    for line in lines:
        words = line.removeprefix("  genai-fast ").partition("  ")[0].split()
        if "--help" not in words:
            parser.parser_of().parse_args(words)


def make_run(here):
    call("train", "vae", *SMALL, "--run", "one")


MISTAKES = {
    "command": (["trian"], "invalid choice: 'trian'"),
    "recipe": (["train", "gan"], "invalid choice: 'gan'"),
    "flag": (["train", "vae", "--epoch", "3"], "unknown argument --epoch; did you mean --epochs?"),
    "type": (["train", "vae", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    "range": (["train", "vae", "--epochs", "0"], "epochs: expected a number >= 1, got 0"),
    "choice": (
        ["train", "vae", "--likelihood", "poisson"],
        "likelihood: expected bernoulli or gaussian, got 'poisson'",
    ),
    "data": (["train", "vae", "--data", "mnits"], "mnits: expected mnist, digits or the path"),
    "device": (["train", "vae", "--device", "tpu"], "device: expected one that works here, got 'tpu'"),
    "meta": (["train", "vae", "--device", "meta"], "device: expected cpu or cuda, got 'meta'"),
    "config": (["train", "vae", "--config", "no.toml"], "no.toml: expected a TOML file"),
    "config key": (["train", "vae", "--config", "bad.toml"], "bad.toml: unknown key 'epoch'; did you mean epochs?"),
    "tf32": (["train", "vae", *SMALL, "--device", "cpu", "--tf32"], "--tf32: expected a CUDA device, got a CPU"),
    "parts of turns": (
        ["train", "mlp-gan", "--data", "digits", "--accumulate", "2"],
        "accumulate: expected 1 for networks in turns, got more",
    ),
    "resume which": (["train", "vae", "--resume"], "--resume: expected the run's name"),
    "resume none": (["train", "vae", "--resume", "--run", "no"], "runs/no: expected a run"),
    "resume other": (["train", "vae", "--resume", "--run", "one", "--lr", "1"], "may change, got --lr"),
    "resume config": (["train", "vae", "--resume", "--run", "one", "--config", "other.toml"], "may change, got --lr"),
    "nested config": (["train", "vae", "--config", "deep.toml"], "deep.toml: expected TOML, got"),
    "bare word": (["train", "vae", "--config", "bare.toml"], 'a string needs quotes, as in data = "mnist"'),
    "bound": (["train", "gpt", "--vocabulary", "9999999"], "vocabulary: expected a number >= 257 and <= 1048576"),
    "huge": (
        ["train", "vae", *SMALL[:4], "--hidden", "1000000000000"],
        "vae: expected sizes of a model that fits, got: ",
    ),
    "strange flag": (["train", "vae", "--strange", "3"], "unknown argument --strange; see"),
    "taken": (["train", "vae", *SMALL, "--run", "one"], "runs/one: a run of this name exists; remedy: --resume"),
    "no run": (["sample", "nothing"], "nothing: expected a run"),
    "count": (["sample", "one", "--count", "0"], "--count: expected at least 1, got 0"),
    "out": (["sample", "one", "--out", "no/such/a.png"], "--out: expected a file in an existing folder"),
    "format": (["sample", "one", "--out", "a.txt"], "--out: expected the name of a PNG file or of a folder, got a.txt"),
    "seed": (["sample", "one", "--seed", str(2**70)], "--seed: expected 0 to 2**63 - 1, got 1180591620717411303424"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line_and_exit_code_2(here, capsys, mistake):
    arguments, message = MISTAKES[mistake]
    (here / "bad.toml").write_text("epoch = 3\n")
    (here / "other.toml").write_text("lr = 1.0\n")
    (here / "deep.toml").write_text("a = " + "[" * 5000)
    (here / "bare.toml").write_text("data = mnist\n")
    if "one" in arguments:
        make_run(here)
        capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*")}
    assert call(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err and said.err.startswith("genai-fast")
    assert {p: p.stat().st_mtime_ns for p in here.rglob("*")} == before  # nothing was written


def test_a_missing_extra_is_named_before_anything_is_trained(here, capsys, monkeypatch):
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    assert call("train", "vae", *SMALL) == 2
    assert 'remedy: pip install safetensors, or pip install ".[train]"' in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_other_data_than_the_runs_is_refused_on_resume(here, capsys):
    np.save(here / "a.npy", np.zeros((50, 4, 4), np.uint8))
    assert call("train", "vae", "--data", "a.npy", "--epochs", "1", "--run", "r") == 0
    np.save(here / "a.npy", np.zeros((60, 4, 4), np.uint8))
    assert call("train", "vae", "--run", "r", "--resume", "--epochs", "2") == 2
    assert "remedy: resume with the same data" in capsys.readouterr().err


def test_a_diverging_run_stops_in_plain_words(here, capsys):
    assert call("train", "vae", *SMALL, "--likelihood", "gaussian", "--lr", "1e30", "--epochs", "5") == 2
    said = capsys.readouterr().err
    assert "warning: updates skipped: 3 in epoch 1" in said and "training stopped at step" in said
    assert "Traceback" not in said


def test_an_interrupt_is_not_a_traceback(here, capsys, monkeypatch):
    def interrupt(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "fit", interrupt)
    assert call("train", "vae", *SMALL) == 130
    assert capsys.readouterr().err.splitlines()[1:] == ["genai-fast train vae: interrupted"]


def test_demo(here, capsys, monkeypatch):
    monkeypatch.setattr(demo, "ROUNDS", 3)
    monkeypatch.setattr(demo, "TURNS", 1)
    assert call("demo", "--epochs", "1") == 0
    pictures = {f"{name}.png" for name in ("samples", "reconstructions", "latent")}
    made = {path.name for path in (here / "runs" / "demo").iterdir()}
    assert made >= pictures | {"metrics.jsonl", "config.toml", "checkpoint-000000036"}
    said = capsys.readouterr().out
    assert re.search(r"backend: +\w+ \(instruction set \w+, \d+ threads", said)
    assert re.search(r"speed: +[\d.]+ x PyTorch as it comes, a training step of 128", said) and "next:" in said
    assert re.search(r"[\d.]+ x by kernels, [\d.]+ x by settings of the process", said)


def test_doctor(capsys):
    assert call("doctor", "--json") == 0
    assert json.loads(capsys.readouterr().out)["versions"]["genai_fast"] == genai_fast.__version__
    assert call("doctor") == 0
    assert "vae_loss" in capsys.readouterr().out


LIGHT = """
import sys, genai_fast
heavy = [m for m in ("matplotlib", "rich", "PIL", "safetensors", "sklearn", "pandas", "genai_fast.training",
                     "genai_fast.data", "genai_fast.models", "genai_fast.cli", "genai_fast.runs") if m in sys.modules]
assert not heavy, heavy
import genai_fast.cli, genai_fast.models.registry, genai_fast.data, genai_fast.models, genai_fast.profiling
heavy = [m for m in ("matplotlib", "rich", "PIL", "safetensors", "sklearn", "mlxtend") if m in sys.modules]
assert not heavy, heavy
"""


def test_importing_is_light_and_the_module_runs():
    environment = {**os.environ, "PYTHONPATH": str(Path(genai_fast.__file__).parents[1])}
    version = ["-m", "genai_fast", "--version"], f"genai-fast {genai_fast.__version__}\n"
    for arguments, expected in ((["-c", LIGHT], ""), version):
        result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (0, expected), result.stderr


def test_a_run_goes_on_by_the_command_that_was_typed_before(here, capsys):
    (here / "a.toml").write_text('data = "digits"\nepochs = 1\nhidden = 16\n')
    command = ("train", "vae", "--config", "a.toml", "--data", "digits", "--run", "runs/r")
    assert call(*command) == 0 and (here / "runs" / "r" / "config.toml").exists()
    assert call(*command, "--resume", "--epochs", "2") == 0
    assert [r["epoch"] for r in records(here / "runs" / "r", "epoch")] == [1, 2]


def test_pictures_do_not_replace_others_in_silence(here, capsys):
    make_run(here)
    for expected in ("grid.png: 2 ", "grid-2.png: 2 ", "grid-3.png: 2 "):
        capsys.readouterr()
        assert call("sample", "one", "--count", "2") == 0
        assert capsys.readouterr().out.startswith(expected)
    for command in ("sample", "interpolate"):
        (here / "b.png").write_bytes(b"")
        assert call(command, "one", "--out", "b.png") == 0
        assert capsys.readouterr().out.startswith("b.png (replaces the former file): ")


def test_an_interrupted_run_prints_a_command_that_works(here, capsys, monkeypatch):
    real, epochs = loop.Step.__call__, ["--epochs", "1"]

    def interrupt(self, *batch):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, *batch)

    for out, more in (("runs", []), ("else where", ["--out", "else where"])):
        with monkeypatch.context() as patch:
            patch.setattr(loop.Step, "__call__", interrupt)
            assert call("train", "vae", *SMALL, *epochs, "--run", "r", "--out", out) == 130
        said = capsys.readouterr().err
        words = ["train", "vae", "--run", "r", *more, "--resume"]
        command = terminal.command(*words)
        assert f"go on with {command}\n" in said and shlex.split(command)[-len(words) :] == words
        assert call(*words) == 0
        capsys.readouterr()


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16"])
def test_precisions_have_two_spellings(here, spelling):
    assert config.build(VAEConfig, {"precision": spelling}, "").precision == "bfloat16"
    model = torch.nn.Linear(2, 1)
    step = Step(lambda x: model(x).sum(), torch.optim.SGD(model.parameters()), precision=spelling)
    assert step.precision == "bfloat16"
    for words in (["tune", "dense-generator"], ["profile", "vae"]):
        assert parser.parser_of().parse_args([*words, "--precision", spelling]).precision == spelling
    assert parser.parser_of().parse_args(["generate", "r", "--weights", spelling]).weights == spelling


def test_names_of_classes_cannot_command_the_terminal(here, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 28, 28), np.uint8)
    for name in ("a$b", "\x1b[31mred"):
        (here / "data" / name).mkdir(parents=True)
        for k, x in enumerate(pixels[:20]):
            Image.fromarray(x).save(here / "data" / name / f"{k}.png")
    small = ["--epochs", "1", "--batch-size", "16", "--latent", "2", "--run", "c"]
    assert call("train", "cvae", "--data", "data", *small) == 0
    capsys.readouterr()
    assert call("sample", "c", "--class", "nope") == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "expected one of \\x1b[31mred, a$b, got nope" in said


def test_reconstructions_are_of_held_out_data(here, capsys):
    assert call("train", "vae", *SMALL, "--run", "one") == 0
    assert call("reconstruct", "one", "--count", "3", "--out", "a.png") == 0
    held_out = data.load("digits").split(0.1, 0)[1].batch(slice(0, 1))[0, 0]
    sheet = torch.from_numpy(np.array(Image.open(here / "a.png")))
    torch.testing.assert_close(sheet[2:34:4, 2:34:4] / 255, held_out, atol=1 / 255, rtol=0)
    assert call("inpaint", "one", "--data", "digits", "--box", "0,0,2,2", "--steps", "1", "--out", "b.png") == 0
    sheet = torch.from_numpy(np.array(Image.open(here / "b.png")))
    torch.testing.assert_close(sheet[2:34:4, 2:34:4] / 255, held_out, atol=1 / 255, rtol=0)
    assert call("reconstruct", "one", "--count", "0") == 2


@pytest.mark.parametrize("command", [["sample", "one"], ["interpolate", "one"]])
def test_a_full_disk_leaves_no_half_of_a_picture_and_is_named(here, capsys, monkeypatch, command):
    make_run(here)
    (here / "a.png").write_bytes(b"before")
    save = Image.Image.save

    def full(self, path, *arguments):
        save(self, path, *arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    capsys.readouterr()
    assert call(*command, "--out", "a.png") == 2
    assert "No space left on device: 'a.png'" in capsys.readouterr().err
    assert (here / "a.png").read_bytes() == b"before" and not list(here.glob(".*"))


def test_starting_up_can_be_interrupted_without_a_traceback(capsys, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(parser, "_options", interrupt)
    assert call("doctor") == 130
    assert capsys.readouterr().err == "genai-fast: interrupted\n"


OWN = """
import argparse, sys, torch
arguments = argparse.ArgumentParser(); arguments.add_argument("--width", type=int, default=3)
width = arguments.parse_args().width
def train():
    assert sys.argv[0] == "mod.py"
    x = torch.randn(4, width)
    return lambda: len(x @ x.t())
def make():
    return torch.nn.Conv2d(width, 4, 3)
"""


@pytest.mark.parametrize("own", [[], ["--", "--width", "5"]])
def test_a_file_of_the_users_own_sees_its_own_arguments(here, monkeypatch, own):
    monkeypatch.setattr(sys, "argv", ["genai-fast", "profile", "mod.py:train"])
    (here / "mod.py").write_text(OWN)
    options = parser._options(["tune", "mod.py:make", *own])
    model, _ = tune.load("mod.py:make", "3x8x8", options.own)
    assert model.in_channels == (5 if own else 3) and sys.argv == ["mod.py", *own[1:]]
    loops.own("mod.py:train", None, None, False, parser._options(["profile", "mod.py:train", *own]).own).make("loop")()
