"""TensorBoard's files: what is in them after a run, and after one that was interrupted and went on."""

import importlib.util
import io
import pydoc_data.topics
import shutil
import sys

import numpy as np
import pytest
from commands import call, records
from PIL import Image

from genai_fast.runs import text_task
from genai_fast.training import checkpoint, progress, tensorboard

VAE = ["--data", "digits", "--batch-size", "512", "--hidden", "8", "--latent", "2", "--grid-every", "1"]
LSTM = ["--layers", "1", "--embedding", "8", "--hidden", "16", "--tokenizer", "byte", "--block", "32"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text_task, "_SAMPLE", 30)
    return tmp_path


def installed():
    return importlib.util.find_spec("tensorboard") is not None


needs_tensorboard = pytest.mark.skipif(not installed(), reason="tensorboard is not installed")


def events(run):
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / tensorboard.FOLDER), {"scalars": 0, "images": 0, "tensors": 0}).Reload()


def points(found, tag):
    return [(event.step, event.value) for event in found.Scalars(tag)]


@needs_tensorboard
def test_a_run_that_goes_on_repeats_no_step(here):
    run = here / "runs" / "a"
    assert call("train", "vae", *VAE, "--epochs", "2", "--log-every", "1", "--run", "a", "--tensorboard") == 0
    shutil.rmtree(checkpoint.latest(run))  # as if it had been killed before the end: epoch 2 is trained again
    assert call("train", "vae", "--run", "a", "--resume", "--epochs", "3") == 0
    found, steps, epochs = events(run), records(run, "step"), records(run, "epoch")
    assert [r["step"] for r in steps] == [*range(1, len(steps) + 1)] and len(epochs) == 3
    assert points(found, "step/loss") == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in steps]
    for tag in ("train/kl", "validation/bits_per_dim", "step_ms/p50"):
        part, name = tag.split("/")
        assert points(found, tag) == [(r["step"], pytest.approx(r[part][name], rel=1e-6)) for r in epochs]
    assert points(found, "epoch/samples_per_second") and points(found, "epoch/data_wait")
    pictures = found.Images("samples")
    assert [p.step for p in pictures] == [r["step"] for r in epochs]
    shown = np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string)).convert("L"))
    assert (shown == np.asarray(Image.open(run / "grids" / "epoch-0003.png"))).all()


@pytest.mark.parametrize("flags", [[], pytest.param(["--tensorboard"], marks=needs_tensorboard)], ids=str)
def test_texts_are_in_the_terminal_and_in_the_board(here, capsys, flags):
    (here / "words.txt").write_text(pydoc_data.topics.topics["while"] * 4)
    arguments = ["--data", "words.txt", *LSTM, "--batch-size", "4", "--epochs", "2", "--sample-every", "2"]
    assert call("train", "lstm", *arguments, "--run", "a", *flags) == 0
    run = here / "runs" / "a"
    sample = (run / "samples" / "epoch-0002.txt").read_text()
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("  | ")] == progress._excerpt(sample) != []
    if not flags:
        assert not (run / tensorboard.FOLDER).exists()
        return
    (event,) = events(run).Tensors("samples/text_summary")
    shown = event.tensor_proto.string_val[0].decode().splitlines()
    assert [line.removeprefix("    ") for line in shown] == sample.splitlines()


def test_without_the_package_nothing_is_begun(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert call("train", "vae", *VAE, "--epochs", "1", "--tensorboard") == 2
    assert 'pip install ".[tensorboard]"' in capsys.readouterr().err and not (here / "runs").exists()


def test_a_sample_cannot_command_the_terminal():
    assert progress._excerpt("\n \n\x1b[2Jred\tx\nb" + "c" * 200 + "\nthird") == [
        "  | \ufffd[2Jred\ufffdx",
        "  | b" + "c" * 99 + " ...",
    ]
    for kind in (progress.Lines, lambda stream: progress.Bar(stream, 1)):
        stream = io.StringIO()
        with kind(stream) as screen:
            screen.sample("[bold]not markup[/bold]\n\nsecond")
        assert "  | [bold]not markup[/bold]\n" in stream.getvalue() and "  | second\n" in stream.getvalue()
