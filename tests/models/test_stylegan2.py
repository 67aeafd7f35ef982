"""StyleGAN2: modulated convolution, lazy regularisation, mixing, truncation, the command line."""

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close
from commands import call

from genai_fast.contract import varies
from genai_fast.layers import ModulatedConv2d
from genai_fast.models.registry import make
from genai_fast.models.stylegan2 import plain
from genai_fast.models.stylegan2.networks import StyleDiscriminator, StyleGenerator
from genai_fast.models.stylegan2.settings import StyleGAN2Config
from genai_fast.training import Step, make_optimizer

SMALL = {"width": 2, "latent": 4, "layers": 2}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _gan(**settings):
    config = StyleGAN2Config(**SMALL | settings)
    return make("stylegan2", config, (1, 8, 8), 0), config


def _by_sample(layer, x, style):
    """Equations 1 to 3 as they stand: a weight for each sample."""
    weight = layer.weight * layer.scale * style[:, None, :, None, None]
    if layer.demodulate:
        weight = weight / (weight.square().sum((2, 3, 4), keepdim=True) + layer.eps).sqrt()
    if not layer.up:
        return torch.cat([F.conv2d(one[None], w, padding=w.size(-1) // 2) for one, w in zip(x, weight, strict=True)])
    y = [F.conv_transpose2d(one[None], w.transpose(0, 1), stride=2) for one, w in zip(x, weight, strict=True)]
    return plain.resampled(torch.cat(y), layer.filter.to(x.dtype), padding=(1, 1)) * 4


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.filterwarnings("ignore::genai_fast.FallbackWarning")
def test_modulated_convolution_is_one_with_a_weight_for_each_sample(up, demodulate):
    layer = ModulatedConv2d(3, 2, 3, up=up, demodulate=demodulate, dtype=torch.float64)
    x, style = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3).double()
    assert_close(layer(x, style), _by_sample(layer, x, style))
    assert layer(x, style).shape == (2, 2, *((8, 10) if up else (4, 5)))
    inputs = x[:1, :, :1, :2].clone().requires_grad_(), style[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)
    assert f"up={up}, demodulate={demodulate}" in repr(layer)


def test_modulated_convolution_in_bfloat16_and_of_no_sample():
    layer = ModulatedConv2d(3, 4, 3)
    x, style = torch.randn(2, 3, 6, 6), torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, style)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x, style), rtol=0.05, atol=0.05)
    assert layer(x[:0], style[:0]).shape == (0, 4, 6, 6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_are_regularised_now_and_then(precision, monkeypatch):
    monkeypatch.setattr("genai_fast.models.stylegan2.model.R1_EVERY", 4)
    monkeypatch.setattr("genai_fast.models.stylegan2.model.PATH_EVERY", 2)
    gan, config = _gan()
    found = []
    for name in ("_r1", "_path_length"):
        original = getattr(gan, name)

        def told(*arguments, name=name, original=original):
            found.append((int(gan.steps), name))
            return original(*arguments)

        monkeypatch.setattr(gan, name, told)
    step, lengths = Step(gan, make_optimizer(gan, config), precision=precision), []
    for _ in range(5):
        losses = step(torch.rand(4, 1, 8, 8) * 2 - 1)
        lengths.append(float(gan.length))
        assert all(x.isfinite() for x in losses)
    assert found == [(0, "_r1"), (0, "_path_length"), (2, "_path_length"), (4, "_r1"), (4, "_path_length")]
    assert varies(gan) and int(gan.steps) == 5 and 0 < lengths[0] == lengths[1] != lengths[2]


def test_r1_is_the_squared_gradient_at_real_images():
    gan, _ = _gan(gamma=3.0)
    x = torch.randn(4, 1, 8, 8).requires_grad_()
    twin = plain.PlainStyleDiscriminator(8, 2, 1)
    twin.load_state_dict(gan.discriminator.state_dict())
    (gradient,) = torch.autograd.grad(twin(x).sum(), x)
    expected = 16 * 3.0 / 2 * gradient.square().sum((1, 2, 3)).mean()
    assert_close(gan._r1(x, gan.discriminator(x)), expected, 1e-4)


def test_second_derivatives_of_both_networks_are_those_of_the_twins():
    z, x = torch.randn(2, 4), torch.randn(4, 1, 8, 8)
    pairs = (
        (StyleGenerator(8, latent=4, width=2, channels=1, layers=1), plain.PlainStyleGenerator(8, 4, 2, 1, 1), z),
        (StyleDiscriminator(8, width=2, channels=1), plain.PlainStyleDiscriminator(8, 2, 1), x),
    )
    for ours, twin, value in pairs:
        twin.load_state_dict(ours.state_dict())
        found = []
        for network in (ours.eval(), twin.eval()):
            v = value.clone().requires_grad_()
            (first,) = torch.autograd.grad(network(v).sin().sum(), v, create_graph=True)
            names, parameters = zip(*network.named_parameters(), strict=True)
            second = torch.autograd.grad(first.square().sum(), parameters, allow_unused=True)
            found.append({n: g for n, g in zip(names, second, strict=True) if g is not None})
        assert found[0].keys() == found[1].keys() and len(found[0]) > 8
        for name, gradient in found[0].items():
            assert_close(gradient, found[1][name], 1e-3)


def test_styles_are_mixed():
    gan, _ = _gan(mixing=1.0)
    ws = gan._styles(64, torch.device("cpu"))
    styles = gan.generator.styles
    assert ws.shape == (64, styles, 4)
    changes = (ws[:, 1:] != ws[:, :-1]).any(2).sum(1)
    assert (changes == 1).all() and (ws[:, 0] != ws[:, -1]).any(1).all()
    gan.mixing = 0.0
    ws = gan._styles(8, torch.device("cpu"))
    assert torch.equal(ws, ws[:, :1].expand_as(ws))


def test_truncation_draws_towards_the_mean_image():
    gan, config = _gan(ema=0.5)
    Step(gan, make_optimizer(gan, config))(torch.rand(4, 1, 8, 8) * 2 - 1)
    assert gan.sampler.mapping.average.abs().max() > 0
    spreads = []
    for gan.truncation in (1.0, 0.5, 0.0):
        spreads.append(float(gan.sample(16, seed=1).std(0).mean()))
    assert spreads[0] > spreads[1] > spreads[2] and spreads[2] < 1e-6


def test_a_sample_depends_on_others_of_its_group_alone():
    x = torch.randn(8, 3, 4, 4)
    y = plain.with_deviation(x)
    assert y.shape == (8, 4, 4, 4) and torch.equal(y[:, :3], x)
    groups = x.view(4, 2, 3, 4, 4).var(0, unbiased=False).add(1e-8).sqrt().mean((1, 2, 3))
    torch.testing.assert_close(y[:, 3, 0, 0], groups.repeat(4))
    for count in (1, 3, 7, 0):  # of groups that divide them
        assert plain.with_deviation(x[:count]).shape == (count, 4, 4, 4)


def test_what_is_refused():
    for kind in (StyleGenerator, StyleDiscriminator):
        for size in (4, 31, 34):
            with pytest.raises(ValueError, match=f"{kind.__name__}: size: expected 28, 32, 64"):
                kind(size)
    with pytest.raises(ValueError, match=r"StyleDiscriminator: expected images \[B, 3, 8, 8\]"):
        StyleDiscriminator(8, width=2)(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="kernel_size: expected 3 with up=True, got 1"):
        ModulatedConv2d(3, 4, 1, up=True)
    with pytest.raises(ValueError, match=r"ModulatedConv2d: expected input \[N, 3, H, W\] and style \[N, 3\]"):
        ModulatedConv2d(3, 4, 3)(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4))


def test_the_command_line_trains_and_samples_with_truncation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [x for name, value in SMALL.items() for x in (f"--{name}", value)]
    assert call("train", "stylegan2", "--data", "digits", "--batch-size", 512, "--epochs", 1, *words, "--run", "s",
                "--quality-every", 0) == 0  # fmt: skip
    assert call("sample", "runs/s", "--count", 4, "--truncation", 0.7, "--out", "a.png") == 0
    assert (tmp_path / "a.png").exists()
    assert call("sample", "runs/s", "--count", 4, "--truncation", 1.5) == 2
    assert "--truncation: expected a number from 0 to 1" in capsys.readouterr().err
