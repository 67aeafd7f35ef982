"""Two folders of real pictures: trained, stopped, resumed, translated; pairs by name; and what is wrong with data."""

import re
import shutil
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import call, records
from PIL import Image

from genai_fast import data
from genai_fast.data import DataError, DataWarning, Images
from genai_fast.models.common.protocol import Translates
from genai_fast.models.registry import RECIPES
from genai_fast.runs.run import open_run
from genai_fast.runs.translation_evaluation import translate
from genai_fast.runs.translation_task import TranslationTask, paired
from genai_fast.training import checkpoint

SMALL = {"cyclegan": ["--width", "4", "--blocks", "1", "--pool", "9"], "pix2pix": ["--width", "4"]}
QUICK = ["--size", "32", "--batch-size", "8", "--log-every", "1", "--flip", "0.5"]


def write(folder, images, chosen, suffix=".png"):
    for k in chosen.tolist():
        path = folder / images.classes[images.labels[k]] / f"{k}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((images.batch(slice(k, k + 1))[0, 0] * 255).round().byte().numpy()).save(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """100 of MNIST's digits, 80 of UCI's, and the former's edges, as pictures in a folder for each class."""
    place = tmp_path_factory.mktemp("sets")
    mnist, digits = data.load("mnist"), data.load("digits")
    spread = torch.cat([(mnist.labels == k).nonzero().flatten()[:10] for k in range(10)])
    write(place / "mnist", mnist, spread)
    write(place / "digits", digits, torch.arange(80))
    edges = Images("edges", (mnist.batch(slice(None)).diff(dim=3, append=torch.zeros(5000, 1, 28, 1)).abs()))
    write(place / "edges", Images("edges", edges.stored, mnist.labels, mnist.classes), spread, ".bmp")
    return place


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(path):
    return np.asarray(Image.open(path))


OF_BOTH = {
    f"{name}_{to}{end}"
    for to in "ab"
    for name, end in (("accuracy", ""), ("accuracy", "_untranslated"), ("accuracy", "_real"))
}
OF_BOTH |= {f"{name}_{to}" for to in "ab" for name in ("cycle", "frechet_distance")} | {"frechet_distance"}
OF_PAIRS = {"frechet_distance", "l1", "psnr", "ssim", "accuracy_b", "accuracy_b_untranslated", "accuracy_b_real"}


@pytest.mark.parametrize("recipe", SMALL)
def test_it_trains_and_goes_on_exactly(here, folders, recipe, capsys):
    other = folders / ("edges" if recipe == "pix2pix" else "digits")
    words = ["train", recipe, "--data", folders / "mnist", "--data-b", other, *SMALL[recipe], *QUICK]
    assert call(*words, "--epochs", "2", "--run", "straight") == 0
    said, run = capsys.readouterr().out, here / "runs" / "straight"
    assert re.search(r"accuracy of A as B +\d", said) and "translate runs/straight --to b --data" in said
    steps, epochs = records(run, "step"), records(run, "epoch")
    assert len(epochs) == 2 and set(epochs[-1]["validation"]) == (OF_PAIRS if recipe == "pix2pix" else OF_BOTH)
    assert epochs[-1]["validation"]["accuracy_b_real"] > 0.5
    assert {"generator", "critic"} < steps[-1].keys() and len(steps) == 2 * (90 // 8)
    targets = RECIPES[recipe].model.targets
    cell = 32 + 2
    for path in (run / "samples.png", run / "grids" / "epoch-0002.png"):
        height, width = picture(path).shape
        assert height == 3 * len(targets) * cell + 2 and width % cell == 2
    assert picture(run / "curves.png").shape[2] == 4

    stopped = ["--epochs", "2", "--quality-every", "0", "--checkpoint-every", "3", "--keep", "99", "--run", "again"]
    assert call(*words, *stopped) == 0
    again = here / "runs" / "again"
    for newer in checkpoint.found(again)[:-3]:  # as if it had been stopped after step 9
        shutil.rmtree(newer)
    assert checkpoint.latest(again).name == "checkpoint-000000009"
    assert call("train", recipe, "--run", "again", "--resume") == 0
    for name in ("model", "training"):
        a, b = (safetensors.torch.load_file(checkpoint.latest(r) / f"{name}.safetensors") for r in (run, again))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    if recipe == "cyclegan":
        assert a["carried.b.images"].shape == (9, 1, 1, 32, 32) and int(a["carried.a.count"]) == 9


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """A run of each recipe, of one epoch."""
    place = tmp_path_factory.mktemp("trained")
    for recipe, other in (("cyclegan", "digits"), ("pix2pix", "edges")):
        words = ["train", recipe, "--data", folders / "mnist", "--data-b", folders / other, *SMALL[recipe], *QUICK]
        assert call(*words, "--quality-every", "0", "--epochs", "1", "--out", place, "--run", recipe) == 0
    return place


def test_translations_are_files_of_the_names_of_the_pictures(here, folders, trained, capsys):
    run = trained / "cyclegan"
    assert call("translate", run, "--to", "a", "--data", folders / "digits", "--out", "made") == 0
    assert f"made: 80 images of digits translated, to a by {run}" in capsys.readouterr().out
    names = sorted(p.relative_to(folders / "digits") for p in (folders / "digits").rglob("*.png"))
    assert sorted(p.relative_to(here / "made") for p in (here / "made").rglob("*.png")) == names
    images, opened = data.load(folders / "digits", 32), open_run(run)
    expected = translate(opened.model, images.batch(slice(0, 80)), "a")
    for name, x in zip(images.names, expected, strict=True):
        assert np.abs(picture(here / "made" / name) - x[0].numpy() * 255).max() <= 0.51
    assert call("translate", run, "--to", "b", "--data", folders / "digits", "--count", "3") == 0
    assert len([*(here / "translated").rglob("*.png")]) == 3
    assert call("translate", run, "--data", "digits", "--count", "2") == 0  # a free name, and no names of files
    assert sorted(p.name for p in (here / "translated-2").iterdir()) == ["000000.png", "000001.png"]
    assert call("translate", run, "--data", "digits", "--count", "5", "--out", "sheet.png") == 0
    assert picture(here / "sheet.png").shape == (2 * 34 + 2, 5 * 34 + 2)


WRONG = {
    "a set that it does not make": (
        ["pix2pix", "--to", "a", "--data", "digits"],
        "--to: expected b for pix2pix, got a",
    ),
    "a count": (["cyclegan", "--data", "digits", "--count", "0"], "--count: expected at least 1, got 0"),
    "a folder in use": (["cyclegan", "--data", "digits", "--out", "full"], "a new or empty folder, got full"),
    "no folder above": (["cyclegan", "--data", "digits", "--out", "no/where"], "--out: expected a file in an existing"),
    "colour": (["cyclegan", "--data", "colour"], "--data: expected images of shape (1, 32, 32)"),
    "no data": (["cyclegan", "--data", "nothing"], "nothing: expected mnist, digits or the path"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_of_translate(here, trained, mistake, capsys):
    for name in ("full", "colour"):
        (here / name).mkdir()
        Image.new("RGB", (32, 32), (200, 10, 90)).save(here / name / "0.png")
    (run, *words), message = WRONG[mistake]
    assert call("translate", trained / run, *words) == 2
    assert message in capsys.readouterr().err
    assert not (here / "translated").exists()


def test_only_what_translates_translates(here, folders, capsys):
    quick = ["--hidden", "8", "--epochs", "1", "--run", "v"]
    assert call("train", "vae", "--data", folders / "digits", *quick) == 0
    assert call("translate", "v", "--data", "digits") == 2
    assert "expected a run of a model that can translate, got one of vae" in capsys.readouterr().err
    assert not any(hasattr(RECIPES["vae"].model, name) for name in ("translate", "targets")) and Translates


MISTAKES = {
    "no second set": (["cyclegan", "--data", "digits"], "cyclegan: --data-b: expected a set of pictures, got nothing"),
    "no first set": (["pix2pix", "--data-b", "digits"], "pix2pix: --data: expected a set of pictures, got nothing"),
    "two sizes": (["cyclegan", "--data", "mnist", "--data-b", "digits"], "mnist of 28 x 28 and digits of 8 x 8 pixels"),
    "unequal": (
        ["pix2pix", "--data", "mnist", "--data-b", "digits", "--size", "32"],
        "as many images in both, whose numbers make the pairs, got 5000 and 1797",
    ),
    "too small": (
        ["cyclegan", "--data", "digits", "--data-b", "digits"],
        "at least 24 pixels for 3 critic_layers, got 8",
    ),
    "odd": (["pix2pix", "--data", "mnist", "--data-b", "mnist", "--size", "30"], "expected a multiple of 4"),
    "a large batch": (
        ["cyclegan", "--data", "digits", "--data-b", "digits", "--size", "32", "--batch-size", "2000"],
        "expected at least 2000 images for training, a batch, in one of them, got 1617",
    ),
    "parts": (
        [
            "cyclegan",
            "--data",
            "digits",
            "--data-b",
            "digits",
            "--size",
            "32",
            "--accumulate",
            "2",
            "--batch-size",
            "8",
        ],
        "accumulate",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_train_leave_nothing(here, mistake, capsys):
    words, message = MISTAKES[mistake]
    assert call("train", *words, "--width", "2") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (here / "runs").exists()


def test_a_run_resumes_on_its_own_data_alone(here, folders, trained, capsys):
    place = here / "copy"
    shutil.copytree(folders / "digits", here / "own")
    words = ["train", "cyclegan", "--data", folders / "mnist", "--data-b", "own", *SMALL["cyclegan"], *QUICK]
    assert call(*words, "--quality-every", "0", "--epochs", "1", "--out", place, "--run", "r") == 0
    victim = next((here / "own").rglob("*.png"))
    Image.fromarray(255 - picture(victim)).save(victim)
    assert call("train", "cyclegan", "--out", place, "--run", "r", "--resume", "--epochs", "2") == 2
    assert "got as many samples with other contents" in capsys.readouterr().err


def named(*names, skipped=(), first=0):
    pixels = torch.arange(first, first + len(names), dtype=torch.uint8).view(-1, 1, 1, 1)
    return Images("x", pixels, names=names, skipped=skipped)


def test_pairs_have_one_name_whatever_their_suffixes():
    a, b = paired(named("c/1.png", "c/2.png", "d/1.png"), named("d/1.jpg", "c/2.jpeg", "c/1.jpg", first=10))
    assert a.pixels.flatten().tolist() == [0, 1, 2] and b.pixels.flatten().tolist() == [12, 11, 10]
    assert [n[:3] for n in a.names] == [n[:3] for n in b.names]
    with pytest.warns(DataWarning, match="1 pictures are left out because their partners are broken"):
        a, b = paired(named("1.png", "2.png"), named("2.png", skipped=("1.png",)))
    assert a.names == b.names == ("2.png",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b = paired(Images("n", torch.zeros(3, 1, 1, 1)), named("2.png", "1.png", "0.png"))  # one has no names
    assert len(a) == len(b) == 3 and b.names == ("2.png", "1.png", "0.png")


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (("1.png", "2.png"), ("2.png",), r"got 1 \(1\) in the first alone and none in the second; remedy: rename"),
        (
            ("5.png",),
            ("1.png", "2.png", "3.png", "4.png", "5.png"),
            r"got none in the first alone and 4 \(1, 2, 3, \.\.\.\)",
        ),
        (("1.png", "1.jpg"), ("1.png",), "expected one picture of each name, got two of 1"),
        (("a\x1b.png",), ("b.png",), r"got 1 \(a\\x1b\)"),
    ],
)
def test_pictures_without_partners_are_named(a, b, message):
    with pytest.raises(DataError, match=message):
        paired(named(*a), named(*b))


def test_grey_and_colour_are_both_colour(here, folders):
    (here / "colour").mkdir()
    for k in range(12):
        Image.new("RGB", (32, 32), (k, 200, 90)).save(here / "colour" / f"{k}.png")
    config = RECIPES["cyclegan"].config(data="colour", data_b=str(folders / "digits"), size=32)
    task = TranslationTask("cyclegan", config)
    assert task.images.shape == task.others.shape == (3, 32, 32)
    x = task.others.batch(slice(0, 4))
    assert torch.equal(x, data.load(folders / "digits", 32).batch(slice(0, 4)).expand(-1, 3, -1, -1))
    assert task.described == "colour and digits: 11 and 72 images for training, 1 and 8 held out"
