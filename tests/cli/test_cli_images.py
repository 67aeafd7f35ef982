"""Every recipe on a folder of real pictures: trained, stopped, resumed, sampled, repaired, taken elsewhere."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import call, records
from PIL import Image

import genai_fast
from genai_fast import data, terminal
from genai_fast.models.conv_vae.plain import PlainConvVAE
from genai_fast.models.registry import RECIPES
from genai_fast.runs import image_evaluation, pictures
from genai_fast.runs.image_task import ImageTask
from genai_fast.training import checkpoint, loop

NETWORKS = {  # small ones
    "vae": ["--hidden", "16", "--latent", "4"],
    "conv-vae": ["--latent", "4"],
    "cvae": ["--latent", "4"],
    "autoencoder": ["--latent", "4"],
    "mlp-gan": ["--latent", "4"],
    "dcgan": ["--latent", "4", "--width", "4", "--ema", "0.9"],
    "cgan": ["--latent", "4", "--width", "4"],
    "wgan-gp": ["--latent", "4", "--width", "4", "--n-critic", "2"],
}
QUICK = ["--epochs", "2", "--batch-size", "16", "--log-every", "1"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """100 handwritten digits as PNG files, a folder for each class."""
    folder = tmp_path_factory.mktemp("pictures") / "digits"
    images = data.load("mnist")
    for k in range(10):
        (folder / str(k)).mkdir(parents=True)
        for index in (images.labels == k).nonzero().flatten()[:10].tolist():
            Image.fromarray(images.pixels[index, 0].numpy()).save(folder / str(k) / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(path):
    return np.asarray(Image.open(path))


QUALITY = {"frechet_distance", "precision", "recall", "density", "coverage", "diversity"}
ELBO = {"loss", "reconstruction", "kl"}


@pytest.mark.parametrize("recipe", NETWORKS)
def test_every_recipe_trains_and_goes_on_exactly(here, digits, recipe, capsys):
    assert call("train", recipe, "--data", digits, *NETWORKS[recipe], *QUICK, "--run", "straight") == 0
    run = here / "runs" / "straight"
    epochs = records(run, "epoch")
    figures = set(epochs[-1]["validation"])
    expected = {
        "autoencoder": {"loss"} | QUALITY,
        "vae": ELBO | {"bits_per_dim"},
        "conv-vae": ELBO | QUALITY,
        "cvae": ELBO | QUALITY,
    }
    assert figures == expected.get(recipe, QUALITY) and len(epochs) == 2
    assert picture(run / "curves.png").shape[2] == 4
    if recipe != "vae":
        assert [p.name for p in sorted((run / "grids").iterdir())] == ["epoch-0001.png", "epoch-0002.png"]
    capsys.readouterr()

    again = [*QUICK[:1], "1", *QUICK[2:], "--checkpoint-every", "3"]
    assert call("train", recipe, "--data", digits, *NETWORKS[recipe], *again, "--run", "again") == 0
    assert call("train", recipe, "--run", "again", "--resume", "--epochs", "2") == 0
    a, b = (checkpoint.latest(here / "runs" / name) / "model.safetensors" for name in ("straight", "again"))
    a, b = safetensors.torch.load_file(a), safetensors.torch.load_file(b)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_samples_in_a_folder_and_weights_in_plain_pytorch(here, digits, capsys):
    assert call("train", "dcgan", "--data", digits, *NETWORKS["dcgan"], *QUICK, "--run", "a") == 0
    assert call("sample", "a", "--count", "130", "--seed", "5", "--out", "many") == 0
    files = sorted((here / "many").iterdir())
    assert len(files) == 130 and files[0].name == "000000.png" and picture(files[129]).shape == (28, 28)
    assert call("sample", "a", "--count", "130", "--out", "many") == 2
    assert "expected a new or empty folder, got many" in capsys.readouterr().err

    assert call("export", "a", "--out", "generator.safetensors") == 0
    said = capsys.readouterr().out
    assert "DCGANGenerator" in said and "load_state_dict(safetensors.torch.load_file(" in said
    nn = torch.nn
    plain = nn.Sequential(
        nn.ConvTranspose2d(4, 8, 7, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 1, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip
    weights = safetensors.torch.load_file(here / "generator.safetensors")
    plain.load_state_dict({key.removeprefix("main."): value for key, value in weights.items()})
    z = torch.randn(130, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        images = plain.eval()(z[:, :, None, None]) * 0.5 + 0.5
    stored = torch.from_numpy(np.stack([picture(f) for f in files]))
    assert (images[:, 0] * 255 - stored).abs().max() <= 0.51


def test_an_exported_vae_loads_into_the_script_that_everyone_writes(here, digits):
    assert call("train", "conv-vae", "--data", digits, *NETWORKS["conv-vae"], *QUICK, "--run", "v") == 0
    assert call("export", "v", "--out", "v.safetensors") == 0
    plain = PlainConvVAE(28, 1, 4, widths=(32, 64))
    plain.load_state_dict(safetensors.torch.load_file(here / "v.safetensors"))


def test_interpolations(here, digits):
    assert call("train", "cgan", "--data", digits, *NETWORKS["cgan"], *QUICK, "--run", "c") == 0
    assert call("interpolate", "c", "--pairs", "2", "--steps", "5", "--seed", "3", "--out", "i.png") == 0
    sheet = picture(here / "i.png")
    cell = 56 + 2  # 28 pixels are enlarged to at least 32
    assert sheet.shape == (2 * cell + 2, 5 * cell + 2)
    cells = [sheet[2 : 2 + 56, 2 + k * cell : 2 + k * cell + 56].astype(int) for k in range(5)]
    steps = [np.abs(a - b).mean() for a, b in itertools.pairwise(cells)]
    whole = np.abs(cells[0] - cells[-1]).mean()
    assert whole > 0 and max(steps) < whole  # small steps, from one end to the other
    assert call("sample", "c", "--count", "4", "--class", "7", "--out", "seven.png") == 0
    assert call("sample", "c", "--count", "4", "--class", "8", "--out", "eight.png") == 0
    assert (picture(here / "seven.png") != picture(here / "eight.png")).any()


def test_repair(here, digits, capsys):
    assert call("train", "vae", "--data", digits, *NETWORKS["vae"], *QUICK, "--run", "v") == 0
    arguments = ["inpaint", "v", "--data", digits, "--count", "3", "--steps", "20"]
    assert call(*arguments, "--box", "7,0,14,28", "--out", "a.png") == 0
    sheet = picture(here / "a.png")
    cell = 56 + 2
    assert sheet.shape == (3 * cell + 2, 3 * cell + 2)
    original, damaged, repaired = (sheet[2 + r * cell : 58 + r * cell, 2:58][::2, ::2] for r in range(3))
    inside = np.zeros((28, 28), bool)
    inside[:, 7:21] = True
    assert (damaged[inside] == 128).all() and (damaged == original)[~inside].all()
    assert (repaired == original)[~inside].all() and (repaired[inside] != 128).any()
    Image.fromarray((inside * 255).astype(np.uint8)).save(here / "mask.png")
    assert call(*arguments, "--mask", "mask.png", "--out", "b.png") == 0
    assert (picture(here / "b.png") == sheet).all()
    # For PostScript Pillow would start a program.
    (here / "evil.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    capsys.readouterr()
    assert call(*arguments, "--mask", "evil.png", "--out", "c.png") == 2
    said = capsys.readouterr().err
    assert "evil.png: expected a picture, got" in said and "Ghostscript" not in said and said.count("\n") == 1


def test_a_zip_trains_as_its_folder_does(here, digits):
    with zipfile.ZipFile(here / "digits.zip", "w") as archive:
        for file in sorted(digits.rglob("*.png")):
            archive.write(file, file.relative_to(digits.parent))
    settings = [*NETWORKS["cgan"], *QUICK]
    assert call("train", "cgan", "--data", digits, *settings, "--run", "folder") == 0
    assert call("train", "cgan", "--data", "digits.zip", *settings, "--run", "zip") == 0
    a, b = (records(here / "runs" / run, "epoch")[-1]["train"] for run in ("folder", "zip"))
    assert a == b


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_process_leaves_a_run_that_goes_on(here, digits, number):
    environment = {**os.environ, "PYTHONPATH": str(Path(genai_fast.__file__).parents[1])}
    command = [sys.executable, "-m", "genai_fast", "train", "dcgan", "--data", str(digits), *NETWORKS["dcgan"]]
    command += ["--epochs", "100000", "--batch-size", "16", "--log-every", "1", "--run", "a", "--quality-every", "0"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        run, end = here / "runs" / "a", time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            if (run / loop.METRICS).exists() and len(records(run, "step")) > 7:
                break
            time.sleep(0.05)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number, error
    found = re.search(rf"stopped by {number.name} after step (\d+) .*--run a --resume\n\Z", error)
    assert found and checkpoint.latest(run).name == f"checkpoint-{int(found[1]):09d}"
    assert "Traceback" not in error
    epoch = records(run, "step")[-1]["epoch"]
    assert call("train", "dcgan", "--run", "a", "--resume", "--epochs", str(epoch + 1)) == 0
    assert [r["epoch"] for r in records(run, "epoch")] == list(range(1, epoch + 2))


def test_a_signal_during_the_last_pictures_says_what_is_there(here, digits, capsys, monkeypatch):
    command = ["train", "autoencoder", *NETWORKS["autoencoder"], *QUICK, "--run", "a"]
    with monkeypatch.context() as patch:
        patch.setattr(ImageTask, "finish", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
        assert call(*command, "--data", digits) == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    remedy = terminal.command("train", "autoencoder", "--run", "a", "--resume")
    assert said.endswith(
        f"runs/a: stopped by SIGTERM after its last epoch, before its last pictures; draw them with {remedy}\n"
    )
    assert not (here / "runs" / "a" / "curves.png").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert call("train", "autoencoder", "--run", "a", "--resume") == 0
    assert {"curves.png", "reconstructions.png"} <= {p.name for p in (here / "runs" / "a").iterdir()}
    assert "all epochs were already done" in capsys.readouterr().out


def test_a_run_says_what_it_trains_on_and_what_its_figures_mean(here, capsys):
    settings = ["--epochs", "1", "--hidden", "8", "--batch-size", "512"]
    assert call("train", "vae", *settings, "--run", "a") == 0
    said = capsys.readouterr()
    name = "vae on mnist (5,000 of its 70,000 images): 4,500 images for training, 500 held out\n"
    assert said.err.startswith(name)
    (line,) = (line for line in said.out.splitlines() if line.startswith("  loss "))
    assert line.endswith("what training minimizes; lower is better")
    assert "bits per dimension" in said.out
    assert call("train", "vae", *settings, "--likelihood", "gaussian", "--run", "b") == 0
    assert "bits_per_dim" not in records(here / "runs" / "b", "epoch")[-1]["validation"]  # of an arbitrary variance


def flat(digits, folder, count=30, size=None):
    folder.mkdir()
    for file in sorted(digits.rglob("*.png"))[:count]:
        with Image.open(file) as image:
            image.resize(size or image.size).save(folder / file.name)
    return folder


MISTAKES = {
    "sizes": (["dcgan", "--data", "mixed"], "remedy: --size PIXELS"),
    "labels": (["cgan", "--data", "flat"], "cgan: expected images with labels, got none; remedy: a folder with one"),
    "side": (["dcgan", "--data", "flat8"], "size: expected one of 28, 32, 64, 128, got 8.*--size"),
    "few": (["dcgan", "--data", "flat"], "flat: expected at least 64 images for training, a batch, got 27 besides 3"),
    "critic's batches": (["wgan-gp", "--data", "flat", "--batch-size", "6"], "expected at least 30 images"),
    "nothing": (["dcgan", "--data", "empty"], "empty: expected pictures"),
    "zip": (["dcgan", "--data", "broken.zip"], "broken.zip: expected"),
    "broken": (["dcgan", "--data", "damaged", "--strict"], "damaged/0.png: expected a picture"),
    "spectral": (
        ["dcgan", "--data", "flat", "--network", "dense", "--spectral"],
        "--spectral: expected --network dcgan",
    ),
    "precision": (["dcgan", "--precision", "half"], "precision: expected float32 or bfloat16 or float16, got 'half'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(here, digits, capsys, mistake):
    arguments, message = MISTAKES[mistake]
    flat(digits, here / "flat")
    flat(digits, here / "flat8", size=(8, 8))
    mixed = flat(digits, here / "mixed")
    Image.new("L", (30, 40)).save(mixed / "other.png")
    (here / "empty").mkdir()
    (here / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    (flat(digits, here / "damaged") / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    assert call("train", *arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and re.search(message, said.err), said.err
    assert not (here / "runs").exists()


def test_a_broken_picture_is_named_and_left_out(here, digits, capsys):
    (flat(digits, here / "damaged") / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    assert call("train", "autoencoder", "--data", "damaged", *NETWORKS["autoencoder"], *QUICK, "--run", "a") == 0
    assert "0.png" in capsys.readouterr().err
    assert checkpoint.read_state(checkpoint.latest(here / "runs" / "a"))["about"]["images"] == 29


@pytest.mark.parametrize("recipe", ["autoencoder", "vae"])
def test_codes_of_two_numbers_are_drawn(here, digits, monkeypatch, recipe):
    """A code in a few images at a time: all at once may be larger than the memory."""
    planes, sizes = [], []
    monkeypatch.setattr(image_evaluation, "_AT_ONCE", 8)
    monkeypatch.setattr(pictures, "plane", lambda points, labels, *_: planes.append((points, labels)))
    encode = RECIPES[recipe].model.encode
    monkeypatch.setattr(RECIPES[recipe].model, "encode", lambda self, x: sizes.append(len(x)) or encode(self, x))
    arguments = [*NETWORKS[recipe], *QUICK, "--latent", "2", "--run", "a"]
    assert call("train", recipe, "--data", digits, *arguments) == 0
    ((points, labels),) = planes
    assert points.shape == (len(labels), 2) and len(labels) > 16 and max(sizes[-3:]) <= 8


def test_with_a_handful_of_pictures_there_is_nothing_to_compare(here, digits, capsys):
    flat(digits, here / "flat")
    assert call("train", "dcgan", "--data", "flat", *NETWORKS["dcgan"], *QUICK, "--run", "a") == 0
    assert [r["validation"] for r in records(here / "runs" / "a", "epoch")] == [{}, {}]
    said = capsys.readouterr().err
    assert said.count("warning: no comparison of samples with held-out images: ") == 1 and "at least 6" in said


@pytest.mark.parametrize("recipe", ["autoencoder", "vae"])
def test_pictures_become_codes_and_pictures_again(here, digits, capsys, recipe):
    flat(digits, here / "flat")
    assert call("train", recipe, "--data", "flat", *NETWORKS[recipe], *QUICK, "--run", "a") == 0
    capsys.readouterr()
    assert call("compress", "a", "--bits", "32", "--out", "c.safetensors") == 0
    assert re.search(
        r"c.safetensors: 30 images of flat.* in [\d,]+ bytes, 16 for each image of 784 \(49.0 times less\); PSNR ",
        capsys.readouterr().out,
    )
    assert call("decompress", "a", "c.safetensors", "--out", "back") == 0
    assert "back: 30 images of c.safetensors, by runs" in capsys.readouterr().out
    run = genai_fast.runs.run.open_run(here / "runs" / "a")
    images = data.load("flat")
    x = images.batch(slice(0, 1), signed=run.model.signed)
    expected = image_evaluation.shown(run.model, run.model.eval().reconstruct(x))[0, 0]
    assert np.abs(picture(here / "back" / "000000.png") / 255 - expected.numpy()).max() < 0.004
    assert call("compress", "a", "--count", "3") == 0
    assert call("decompress", "a", "codes.safetensors", "--out", "back.png") == 0
    assert call("decompress", "a", "codes.safetensors", "--out", "back") == 2
    assert "expected a new or empty folder, got back" in capsys.readouterr().err


def test_commands_refuse_what_a_model_cannot(here, digits, capsys):
    for recipe, name in (("mlp-gan", "g"), ("autoencoder", "e"), ("cvae", "c")):
        assert call("train", recipe, "--data", digits, *NETWORKS[recipe], *QUICK, "--epochs", "1", "--run", name) == 0
    capsys.readouterr()
    box = ["--data", digits, "--box", "0,0,4,4"]
    for arguments, message in (
        (["inpaint", "g", *box], "expected a run of a model that can inpaint, got one of mlp-gan"),
        (["compress", "g"], "expected a run of a model that can compress, got one of mlp-gan"),
        (["compress", "c"], "expected a run of an autoencoder or VAE of images without classes, got one of cvae"),
        (["compress", "e", "--out", "e.npz"], "--out: expected the name of a .safetensors file, got e.npz"),
        (["decompress", "e", "none.safetensors"], "none.safetensors: expected a file that `genai-fast compress` wrote"),
        (["sample", "g", "--class", "3"], "--class: expected a run of a conditional model, got one of mlp-gan"),
        (["inpaint", "g", "--data", digits], "expected either --box LEFT,TOP,WIDTH,HEIGHT or --mask FILE"),
        (["export", "g", "--out", "g.pt"], "--out: expected the name of a .safetensors file, or of a folder"),
    ):
        assert call(*arguments) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("recipe", ["vae", "conv-vae"])
def test_fine_tuning_on_other_images_names_what_does_not_match(here, digits, capsys, recipe):
    """Other pixels for the dense model, other channels for the convolutional one; what matches is taken as it is."""
    colours = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 3), dtype=np.uint8)
    np.save(here / "colours.npy", colours)
    before, after, expected = {
        "vae": ("digits", digits, r"fc1\.weight \(expected \(16, 784\), got \(16, 64\)\)"),
        "conv-vae": (digits, "colours.npy", r"weight \(expected \(\d+, 3, \d, \d\), got \(\d+, 1, \d, \d\)\)"),
    }[recipe]
    once = [*NETWORKS[recipe], "--epochs", "1", "--quality-every", "0", "--grid-every", "0"]
    assert call("train", recipe, "--data", before, *once, "--run", "before") == 0
    capsys.readouterr()
    still = ["--lr", "1e-30", "--batch-size", "16"]  # so that what was taken can be seen at the end
    assert call("train", recipe, "--data", after, *once, *still, "--init", "before", "--run", "after") == 0
    said = capsys.readouterr().err
    taken = re.search(r"before.*model\.safetensors: (\d+) tensors taken, these do not match: ", said)
    assert taken and re.search(expected, said)
    latest = (checkpoint.latest(here / "runs" / name) for name in ("before", "after"))
    a, b = (safetensors.torch.load_file(path / "model.safetensors") for path in latest)
    matching = [k for k in a if k in b and a[k].shape == b[k].shape]
    statistics = [k for k in matching if "running" in k or "num_batches" in k]  # these move without a rate
    assert len(matching) == int(taken[1]) < len(b)
    assert all(torch.equal(a[k], b[k]) for k in matching if k not in statistics)
