"""Codes, their prior, and labelled images that it makes, on the command line."""

import json
import re
import shutil

import pytest
import torch
from commands import call, records

from genai_fast import data
from genai_fast.evaluation import augmentation_study
from genai_fast.models import VQGPT
from genai_fast.runs import run

VQ = ["--codebook", "32", "--embedding", "8", "--hidden", "16", "--blocks", "1", "--halvings", "1"]
QUICK = ["--data", "digits", "--epochs", "1", "--batch-size", "256", "--quality-every", "0", "--grid-every", "0"]
SPLIT = ["--validation", "0.9", "--seed", "7"]
GPT = ["--layers", "1", "--heads", "2", "--width", "16", "--epochs", "1", "--quality-every", "0", "--batch-size", "256"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    assert call("train", "vq-vae", *QUICK, *VQ, *SPLIT, "--out", folder, "--run", "vq") == 0
    assert call("train", "vq-gpt", "--codes", "vq", *GPT, "--out", folder, "--run", "gpt") == 0
    return folder


def test_the_prior_has_the_data_and_sizes_of_its_codes(runs):
    vq, prior = run.open_run(runs / "vq"), run.open_run(runs / "gpt")
    assert {"reconstruction", "codes_used"} <= records(runs / "vq", "epoch")[-1]["validation"].keys()
    assert (prior.config.validation, prior.config.seed, prior.config.codebook) == (0.9, 7, 32)
    assert isinstance(prior.model, VQGPT) and len(prior.classes) == 10 == prior.model.classes
    state = vq.model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in prior.model.vq.state_dict().items())
    assert (runs / "vq" / "reconstructions.png").exists() and (runs / "gpt" / "samples.png").exists()


def test_codes_are_interpolated_between_held_out_images(runs, tmp_path):
    model = run.open_run(runs / "vq").model
    a, b = data.load("digits").batch(torch.tensor([0, 1]), signed=True)
    between = model.interpolate(a, b, 5)
    torch.testing.assert_close(between[[0, -1]], model.reconstruct(torch.stack([a, b])))
    out = tmp_path / "between.png"
    assert call("interpolate", runs / "vq", "--pairs", "2", "--steps", "5", "--out", out) == 0 and out.exists()
    assert call("interpolate", runs / "gpt", "--pairs", "2", "--steps", "3", "--out", tmp_path / "drawn.png") == 0


def test_a_traversal_changes_one_dimension_in_each_row(tmp_path, monkeypatch):
    """The dimensions that a VAE uses most come first."""
    vae = ["--hidden", "16", "--latent", "6", "--epochs", "3", "--batch-size", "32", "--quality-every", "0"]
    assert call("train", "vae", "--data", "digits", *vae, "--out", tmp_path, "--run", "vae") == 0
    seen, model = [], run.open_run(tmp_path / "vae").model
    decode = type(model).decode
    monkeypatch.setattr(type(model), "decode", lambda self, z, *labels: seen.append(z) or decode(self, z, *labels))
    out = tmp_path / "traversal.png"
    assert call("interpolate", tmp_path / "vae", "--traverse", "--pairs", "4", "--steps", "5", "--out", out) == 0
    z = torch.cat(seen).view(4, 5, 6)
    images = data.load("digits").split(0.1, 0)[1]
    order = model.encode(images.batch(slice(0, 1000)))[0].var(0).argsort(descending=True)
    for row in range(4):
        changed = (z[row] != z[row, :1]).any(0).nonzero().flatten()
        assert changed.tolist() == [order[row]]
        torch.testing.assert_close(z[row, :, order[row]], torch.linspace(-3, 3, 5))
    assert call("interpolate", tmp_path / "vae", "--traverse", "--pairs", "7", "--out", out) == 2


def test_a_prior_needs_no_run_but_its_own(runs, tmp_path):
    shutil.copytree(runs / "gpt", tmp_path / "gpt")
    assert call("sample", tmp_path / "gpt", "--count", "3", "--class", "4", "--out", tmp_path / "four.png") == 0
    assert call("train", "vq-gpt", "--run", "gpt", "--out", tmp_path, "--resume", "--epochs", "2") == 0
    assert len(records(tmp_path / "gpt", "epoch")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"vq-gpt: expected --codes RUN, a run of vq-vae, got none; remedy: genai-fast train vq-vae first"),
        (["--codes", "gpt"], "--codes: expected a run of vq-vae, got"),
        (["--codes", "vq", "--codebook", "16"], "codebook: expected 32 as"),
        (["--codes", "vq", "--size", "16"], r"--codes: expected a run on images of \(1, 16, 16\).*got \(1, 8, 8\)"),
    ],
)
def test_codes_that_do_not_fit(runs, capsys, arguments, message):
    assert call("train", "vq-gpt", *arguments, *GPT, "--out", runs) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said), said
    assert sorted(path.name for path in runs.iterdir()) == ["gpt", "vq"]


def test_a_labelled_folder_is_data(runs, tmp_path, capsys):
    out = tmp_path / "made"
    assert call("sample", runs / "gpt", "--classes", "3,0", "--count", "5", "--out", out) == 0
    assert "5 samples of" in capsys.readouterr().out
    images = data.load(str(out))
    assert images.classes == ("0", "3") and images.labels.bincount().tolist() == [5, 5] and images.shape == (1, 8, 8)
    for k, name in enumerate(("0", "3")):  # a class alone is what it is among others
        again = tmp_path / f"again-{name}"
        assert call("sample", runs / "gpt", "--classes", name, "--count", "5", "--out", again) == 0
        expected = images.pixels[images.labels == k]
        found = data.load(str(again / name)).pixels
        assert torch.equal(found, expected)
    assert call("sample", runs / "gpt", "--classes", "all", "--count", "1", "--out", tmp_path / "all") == 0
    assert len(data.load(str(tmp_path / "all")).classes) == 10


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gpt", ["--classes", "3,x"], "--classes: expected all, or some of 0, 1, 2"),
        ("gpt", ["--classes", "3,3"], "each once, got 3,3"),
        ("gpt", ["--classes", "3", "--class", "3"], "got both"),
        ("gpt", ["--classes", "3", "--out", "grid.png"], "--out: expected the name of a folder with --classes"),
        ("vq", ["--classes", "all"], "expected a run of a model that can sample"),
    ],
)
def test_classes_that_do_not_fit(runs, tmp_path, monkeypatch, capsys, name, arguments, message):
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in arguments else ["--out", "made"]
    assert call("sample", runs / name, *arguments, *out) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not any(tmp_path.iterdir())


def test_augment_study(runs, tmp_path, capsys):
    out = tmp_path / "study.json"
    assert call("augment-study", runs / "gpt", "--count", "2", "--seeds", "2", "--steps", "40", "--out", out) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    real, generated, both = found["trained_on"]
    assert (real["images"], generated["images"], both["images"]) == (180, 20, 200) and found["test_images"] == 1617
    assert all(0 <= x <= 1 for f in found["trained_on"] for x in f["accuracies"]) and "real and generated" in said
    assert min(real["accuracies"]) > 0.6  # of real digits


def test_generated_images_that_are_real_help():
    """Among 30 labelled digits and 300 more of their kind, the study sees the difference, in either direction."""
    digits = data.load("digits")
    real, more, test = (digits.subset(torch.arange(a, b)) for a, b in ((0, 30), (30, 330), (330, 830)))
    found = {f.name: f for f in augmentation_study(real, more, test, range(2), 50)}
    assert found["real and generated"].mean > found["real"].mean + 0.05 and found["real and generated"].images == 330
    assert found["real"].deviation >= 0
    with pytest.raises(ValueError, match=r"test: expected images .* got"):
        augmentation_study(real, more, test.resized(16), range(1))
