"""Super-resolution: networks, losses by their formulas, weights from a first run, figures beside bicubic, upscale."""

import re

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from alike import assert_close
from commands import call, records
from PIL import Image
from torch import nn

from genai_fast import data
from genai_fast.evaluation import psnr
from genai_fast.models import SRGAN, Enlarger, SRCritic, SRResNet
from genai_fast.models.registry import make
from genai_fast.models.srgan import plain
from genai_fast.models.srgan.settings import SRGANConfig, SRResNetConfig
from genai_fast.runs.image_evaluation import enlarged, shown, upscaled
from genai_fast.runs.run import open_run
from genai_fast.training import Step, checkpoint, make_optimizer

SMALL = ["--width", "8", "--blocks", "1", "--scale", "2"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("residual", [True, False])
def test_an_enlarger_is_that_of_plain_pytorch(scale, residual):
    ours = Enlarger(scale=scale, channels=1, width=8, blocks=2, residual=residual)
    twin = plain.PlainEnlarger(scale, 1, 8, 2, residual)
    twin.load_state_dict(ours.state_dict())
    x = torch.randn(2, 1, 9, 14)
    for training in (True, False):
        y, expected = ours.train(training)(x), twin.train(training)(x)
        assert y.shape == (2, 1, 9 * scale, 14 * scale)
        assert_close(y, expected, 1e-4)
    for key, value in ours.state_dict().items():
        assert_close(value, twin.state_dict()[key], 1e-4)
    distance = float((y.detach() - F.interpolate(x, scale_factor=scale, mode="bicubic")).abs().mean())
    assert (distance < 0.05) is residual


def test_sizes_are_those_of_the_paper():
    with torch.device("meta"):
        network, critic = Enlarger(), SRCritic()
    kinds = [type(m).__name__ for m in network.modules()]
    assert kinds.count("_Block") == 16 and kinds.count("BatchNorm2d") == 33 and kinds.count("PixelShuffle") == 2
    assert kinds.count("PReLU") == 1 + 16 + 2 and kinds.count("Conv2d") == 1 + 33 + 2 + 1
    convs = [(m.in_channels, m.out_channels, m.stride[0]) for m in critic.modules() if isinstance(m, nn.Conv2d)]
    assert convs == [
        (3, 64, 1), (64, 64, 2), (64, 128, 1), (128, 128, 2), (128, 256, 1), (256, 256, 2), (256, 512, 1),
        (512, 512, 2),
    ]  # fmt: skip
    linears = [(m.in_features, m.out_features) for m in critic.modules() if isinstance(m, nn.Linear)]
    assert linears == [(512 * 6 * 6, 1024), (1024, 1)]


def test_losses_by_their_formulas():
    gan = make("srgan", SRGANConfig(width=4, blocks=1, scale=2, adversarial=0.1), (3, 16, 16), 0)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    small = F.interpolate(x, (8, 8), mode="bicubic", antialias=True)
    assert torch.equal(gan.lower(x), small)
    made = gan.generator(small)
    real, fake = gan.critic(x).sigmoid(), gan.critic(made).sigmoid()
    turns = gan.turns(x)
    parameters, loss = next(turns)
    assert parameters[0] is next(gan.critic.parameters())
    assert_close(loss, -real.log().mean() - (1 - fake).log().mean(), 1e-4)
    parameters, loss = next(turns)
    assert parameters[0] is next(gan.generator.parameters())
    assert_close(loss, F.mse_loss(made, x) - 0.1 * fake.log().mean(), 1e-4)
    network = make("srresnet", SRResNetConfig(width=4, blocks=1, scale=2), (3, 16, 16), 0)
    assert_close(network.training_step(x).loss, F.mse_loss(network(small), x), 1e-5)


def test_it_learns_to_beat_bicubic_on_stripes():
    """Stripes of one pixel are grey to bicubic interpolation; the network learns that there are always some."""
    stripes = torch.ones(1, 1, 16, 16)
    stripes[..., ::2] = -1
    config = SRResNetConfig(width=8, blocks=1, scale=2, lr=5e-3)
    network = make("srresnet", config, (1, 16, 16), 0)
    step = Step(network, make_optimizer(network, config))
    for _ in range(60):
        step(stripes * (0.2 + 0.8 * torch.rand(8, 1, 1, 1)))
    x = (stripes * torch.tensor([0.4, 0.9]).view(2, 1, 1, 1)) / 2 + 0.5
    small, large, made = enlarged(network, x)
    assert small.shape == (2, 1, 8, 8) and large.shape == made.shape == x.shape
    assert psnr(made, x) > psnr(large, x) + 3


@pytest.mark.parametrize("scale", [2, 4])
def test_tiles_leave_no_seams(scale):
    network = Enlarger(scale=scale, channels=1, width=4, blocks=2, residual=False).eval()
    for m in network.modules():  # so that what is far away would show
        if isinstance(m, nn.Conv2d):
            nn.init.constant_(m.weight, 1 / m.weight[0].numel())
    x = torch.rand(1, 61, 47)
    assert network.reach < 16
    whole = shown(network, network.upscale(x[None] * 2 - 1))[0]
    assert whole.std() > 0.01
    assert_close(upscaled(network, x, tile=16), whole, 1e-5)
    network.reach = 2
    assert (upscaled(network, x, tile=16) - whole).abs().max() > 1e-3
    near = x.clone()
    near[0, 30, 20] += 0.5  # what a pixel changes is not further away than is said
    changed = (network.upscale(near[None]) - network.upscale(x[None]))[0, 0].abs().gt(0).nonzero() // scale
    assert (changed - torch.tensor([30, 20])).abs().max() <= 2 * 2 + 10


MISTAKES = {
    "scale": (lambda: Enlarger(scale=3), "Enlarger: scale: expected 2 or 4, got 3"),
    "channels": (lambda: Enlarger(width=4, blocks=1)(torch.zeros(1, 1, 8, 8)), r"expected images \[B, 3, H, W\]"),
    "side": (lambda: SRResNet(width=4, blocks=1).lower(torch.zeros(1, 3, 8, 10)), "sides are multiples of 4"),
    "size": (lambda: make("srresnet", SRResNetConfig(), (3, 30, 30), 0), "multiple of the scale, 4, got 30.*--size"),
    "critic": (lambda: SRCritic(32, width=2)(torch.zeros(1, 3, 16, 16)), "expected images"),
    "weight": (lambda: SRGAN(Enlarger(width=4, blocks=1), nn.Identity(), adversarial=-1.0), "adversarial: expected at"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both recipes on 60 digits, the second begun from the first."""
    place = tmp_path_factory.mktemp("enlarged")
    digits = data.load("mnist")
    np.savez(place / "digits.npz", images=digits.pixels[::83].numpy())
    words = ["--data", place / "digits.npz", *SMALL, "--batch-size", "8", "--epochs", "2", "--out", place]
    assert call("train", "srresnet", *words, "--run", "first") == 0
    assert call("train", "srgan", *words, "--init", "first", "--run", "second") == 0
    return place


def test_a_run_has_figures_beside_bicubic_and_pictures(trained):
    for name, more in (("first", {"loss"}), ("second", set())):
        figures = records(trained / name, "epoch")[-1]["validation"]
        assert set(figures) == {"psnr", "psnr_bicubic", "ssim", "ssim_bicubic"} | more
        run = open_run(trained / name)
        _, held_out = data.load(trained / "digits.npz").split(0.1, 0)
        x = held_out.batch(slice(0, 6))
        small = F.interpolate(x * 2 - 1, (14, 14), mode="bicubic", antialias=True)
        large = F.interpolate(small, (28, 28), mode="bicubic") / 2 + 0.5
        assert figures["psnr_bicubic"] == pytest.approx(psnr(large.clamp(0, 1), x), abs=1e-3)
        assert figures["psnr"] == pytest.approx(psnr(shown(run.model, run.model.upscale(small)), x), abs=1e-3)
        cell = 56 + 2
        assert np.asarray(Image.open(trained / name / "samples.png")).shape == (4 * cell + 2, 6 * cell + 2)
        assert (trained / name / "grids" / "epoch-0002.png").exists()


def test_srgan_begins_with_the_weights_of_srresnet(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--data", trained / "digits.npz", *SMALL, "--batch-size", "8", "--epochs", "1", "--lr", "1e-9"]
    assert call("train", "srgan", *words, "--init", trained / "first", "--run", "s") == 0
    first = safetensors.torch.load_file(checkpoint.latest(trained / "first") / "model.safetensors")
    assert re.search(rf"model.safetensors: {len(first)} tensors taken\n", capsys.readouterr().err)
    second = safetensors.torch.load_file(checkpoint.latest(tmp_path / "runs" / "s") / "model.safetensors")
    for key, value in first.items():
        if "running" not in key and "num_batches" not in key:
            assert (second[f"generator.{key}"] - value).abs().max() < 1e-6, key
    assert call("train", "mlp-gan", "--data", "mnist", "--init", trained / "first", "--epochs", "1") == 2
    assert "got no tensor that fits" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["srresnet", "srgan"])
def test_it_goes_on_exactly(trained, tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--data", trained / "digits.npz", *SMALL, "--batch-size", "8", "--quality-every", "0", "--decay", "none"]
    assert call("train", recipe, *words, "--epochs", "2", "--run", "straight") == 0
    assert call("train", recipe, *words, "--epochs", "1", "--run", "again") == 0
    assert call("train", recipe, "--run", "again", "--resume", "--epochs", "2") == 0
    for name in ("model", "training"):
        a, b = (
            safetensors.torch.load_file(checkpoint.latest(tmp_path / "runs" / run) / f"{name}.safetensors")
            for run in ("straight", "again")
        )
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_upscale_takes_a_picture_of_any_size(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    Image.fromarray(pixels).save("small.png")
    assert call("upscale", trained / "first", "small.png") == 0
    assert "upscaled.png: small.png enlarged from 13 x 9 to 26 x 18 pixels" in capsys.readouterr().out
    run = open_run(trained / "first")
    grey = torch.from_numpy(np.asarray(Image.open("small.png").convert("L")).copy())[None, None] / 127.5 - 1
    expected = shown(run.model, run.model.upscale(grey))[0, 0] * 255
    assert (torch.from_numpy(np.asarray(Image.open("upscaled.png")).copy()) - expected).abs().max() <= 0.51
    for words, message in (
        (["nothing.png"], "nothing.png: expected a picture, got "),
        (["small.png", "--out", "large.jpg"], "--out: expected the name of a PNG file"),
    ):
        assert call("upscale", trained / "first", *words) == 2
        assert message in capsys.readouterr().err
