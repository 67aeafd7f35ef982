"""`genai-fast tune`: measures, prints and remembers; what cannot be is said."""

import io
import sys

import pytest
import torch

from genai_fast import autotune
from genai_fast.cli.parser import main
from genai_fast.fusion.implementations import CONVOLUTIONS


@pytest.fixture(autouse=True)
def _measured(monkeypatch, tmp_path, small_is_fused):
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path / "cache"))
    autotune.forget()
    yield
    autotune.forget()


MODEL = """
from torch import nn

def generator():
    return nn.Sequential(nn.ConvTranspose2d(6, 8, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3), nn.Tanh())

def nothing():
    return 3
"""


def test_tune_fills_the_file_that_the_model_then_uses(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(MODEL)
    assert main(["tune", f"{tmp_path}/mine.py:generator", "--input", "6x1x1", "--batch", "4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in printed if "cache" not in line)
    assert any("torch" in p and "gemm" in p for p in printed)
    ((_, families),) = autotune.remembered().items()
    choices = {autotune._text((f,), s): choice for f, shapes in families.items() for s, choice in shapes.items()}
    changed = sum(choice.name != "torch" for choice in choices.values())
    assert printed[0].startswith(f"{len(choices)} convolutions, {changed} of them faster than by default")
    assert printed[1] == f"choices are kept in {autotune.file()}"
    text = " ".join(" ".join(printed).split())
    assert all(f"{key} {choice.name}: " in text for key, choice in choices.items())
    assert {choice.name for choice in choices.values()} <= {option.name for option in CONVOLUTIONS}
    assert all(choice.microseconds for choice in choices.values())
    monkeypatch.setattr(autotune, "_measure", lambda *_: pytest.fail("measured again"))
    out = ["--out", f"{tmp_path}/table.md"]
    assert main(["tune", f"{tmp_path}/mine.py:generator", "--input", "6x1x1", "--batch", "4", *out]) == 0
    written = (tmp_path / "table.md").read_text()
    assert autotune.machine(torch.device("cpu")) in written
    assert all(f"| {key} | {choice.name} |" in written for key, choice in choices.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dcgan"], "MODEL: expected one of dcgan-32-generator"),
        (["none.py:model", "--input", "3x8x8"], "none.py: no such file"),
        (["no_such_module:model", "--input", "3x8x8"], "cannot be imported"),
        (["{folder}/mine.py:model", "--input", "3x8x8"], "expected 'model' in"),
        (["{folder}/mine.py:nothing", "--input", "3x8x8"], "to give an nn.Module, got int"),
        (["{folder}/mine.py:generator"], "--input: expected the shape"),
        (["{folder}/mine.py:generator", "--input", "3x0"], "--input: expected sizes such as"),
        (["dcgan-28-generator", "--out", "{folder}/none/table.md"], "--out: expected a file in an existing folder"),
        (["dcgan-28-generator", "--batch", "0"], "--batch: expected at least 1, got 0"),
        (["dcgan-28-generator", "--device", "tpu9"], "--device: tpu9"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, arguments, message):
    (tmp_path / "mine.py").write_text(MODEL)
    assert main(["tune", *(a.format(folder=tmp_path) for a in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_pinned_choices_cannot_be_tuned(monkeypatch, capsys):
    monkeypatch.setenv("GENAI_FAST_DETERMINISTIC", "1")
    assert main(["tune", "dcgan-28-generator"]) == 2
    assert "unset GENAI_FAST_DETERMINISTIC" in capsys.readouterr().err


def test_choices_are_forgotten(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(MODEL)
    model = [f"{tmp_path}/mine.py:generator", "--input", "6x1x1", "--batch", "4"]
    assert main(["tune", *model]) == 0
    count = len(autotune.chosen(torch.device("cpu")))
    capsys.readouterr()
    assert main(["tune", "--forget"]) == 0
    assert capsys.readouterr().out == f"{autotune.file()}: {count} choices forgotten\n"
    assert not autotune.file().exists() and not autotune.chosen(torch.device("cpu"))
    assert main(["tune", "--forget", *model]) == 0 and autotune.file().exists()  # measured again
    assert main(["tune"]) == 2 and "MODEL: expected one or more, got none" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_once_that_convolutions_are_measured(tmp_path, monkeypatch, terminal):
    said = io.StringIO()
    said.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", said)
    autotune._announce.cache_clear()
    (tmp_path / "mine.py").write_text(MODEL)
    assert main(["tune", f"{tmp_path}/mine.py:generator", "--input", "6x1x1", "--batch", "4"]) == 0
    line = f"genai_fast: measuring convolutions and attention, once for this machine; kept in {autotune.file()}\n"
    assert said.getvalue() == (line if terminal else "")
    autotune._announce.cache_clear()
