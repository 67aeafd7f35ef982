"""Keras' textbook networks: arrays in Keras' layouts give what an independent NumPy of Keras' definitions gives."""

import itertools

import numpy as np
import pytest
import torch
from alike import assert_alike
from torch import nn

from genai_fast import models
from genai_fast.errors import UsageError
from genai_fast.models import load_keras
from genai_fast.models.registry import make
from genai_fast.models.vae.settings import VAEConfig
from genai_fast.training import Step, checkpoint, make_optimizer

RNG = np.random.default_rng(0)


def _draw(*shape):
    return RNG.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]) if len(shape) > 1 else 4)


def _norm(n):
    """gamma, beta, moving mean, moving variance."""
    return [1 + 0.2 * _draw(n), _draw(n), _draw(n), RNG.uniform(0.5, 2, n)]


def conv(x, kernel, stride):
    """Conv2D, padding "same": x [B, H, W, C], kernel [h, w, in, out]; the odd pixel is padded at the end."""
    k, (b, n, _, _) = len(kernel), x.shape
    total = max((-(-n // stride) - 1) * stride + k - n, 0)
    x = np.pad(x, ((0, 0), (total // 2, total - total // 2), (total // 2, total - total // 2), (0, 0)))
    out = np.empty((b, -(-n // stride), -(-n // stride), kernel.shape[3]))
    for i, j in itertools.product(range(out.shape[1]), repeat=2):
        part = x[:, i * stride : i * stride + k, j * stride : j * stride + k]
        out[:, i, j] = np.einsum("bhwc,hwco->bo", part, kernel)
    return out


def conv_transpose(x, kernel, stride):
    """Conv2DTranspose, padding "same": the gradient of `conv` for an input of stride times the size."""
    k, (b, n, _, _) = len(kernel), x.shape
    total, large = max((n - 1) * stride + k - n * stride, 0), n * stride
    whole = np.zeros((b, large + total, large + total, kernel.shape[2]))
    for i, j in itertools.product(range(n), repeat=2):
        part = whole[:, i * stride : i * stride + k, j * stride : j * stride + k]
        part += np.einsum("bc,hwoc->bhwo", x[:, i, j], kernel)
    return whole[:, total // 2 :, total // 2 :][:, :large, :large]


def norm(x, gamma, beta, mean, variance):
    return gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta


def leaky(x, slope):
    return np.where(x > 0, x, slope * x)


def generator(z, side, w):
    """w: dense, norm, conv, norm, conv, norm, conv."""
    w = iter(w)
    take = lambda n: list(itertools.islice(w, n))  # noqa: E731
    x = leaky(norm(z @ next(w), *take(4)), 0.3).reshape(len(z), side, side, -1)
    for stride in (1, 2):
        x = leaky(norm(conv_transpose(x, next(w), stride), *take(4)), 0.3)
    return np.tanh(conv_transpose(x, next(w), 2))


def generator_k4(z, side, w):
    w = iter(w)
    take = lambda n: list(itertools.islice(w, n))  # noqa: E731
    x = leaky(norm(np.maximum(z @ next(w) + next(w), 0), *take(4)), 0.3).reshape(len(z), side, side, -1)
    for _ in range(2):
        x = leaky(norm(conv_transpose(x, next(w), 2) + next(w), *take(4)), 0.3)
    return np.tanh(conv(x, next(w), 1) + next(w))


def critic(x, w):
    w = iter(w)
    for _ in range(2):
        x = leaky(norm(conv(x, next(w), 2), *itertools.islice(w, 4)), 0.3)
    return (x.reshape(len(x), -1) @ next(w) + next(w))[:, 0]


def critic_k4(x, w):
    w = iter(w)
    for _ in range(2):
        x = norm(leaky(conv(x, next(w), 2) + next(w), 0.2), *itertools.islice(w, 4))
    return (x.reshape(len(x), -1) @ next(w) + next(w))[:, 0]


def _generator_weights(latent, side, channels):
    flat = 256 * side * side
    first, second, last = _draw(5, 5, 128, 256), _draw(5, 5, 64, 128), _draw(5, 5, channels, 64)
    return [_draw(latent, flat), *_norm(flat), first * 2, *_norm(128), second * 2, *_norm(64), last * 2]


def _generator_k4_weights(latent, side, channels):
    flat, ups = 128 * side * side, [[_draw(4, 4, 128, 128) * 2, _draw(128), *_norm(128)] for _ in range(2)]
    last = [_draw(3, 3, 128, channels), _draw(channels)]
    return [_draw(latent, flat), _draw(flat), *_norm(flat), *ups[0], *ups[1], *last]


def _critic_weights(channels, size):
    convs = [[_draw(5, 5, a, b), *_norm(b)] for a, b in ((channels, 64), (64, 128))]
    return [*convs[0], *convs[1], _draw(128 * (size // 4) ** 2, 1), _draw(1)]


def _critic_k4_weights(channels, size):
    convs = [[_draw(3, 3, a, 128), _draw(128), *_norm(128)] for a in (channels, 128)]
    return [*convs[0], *convs[1], _draw(128 * (size // 4) ** 2, 1), _draw(1)]


def _channels_last(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("kind", ["", "K4"])
@pytest.mark.parametrize("side", [2, 3])
def test_a_file_of_keras_weights_gives_keras_pictures(kind, side, tmp_path):
    weights = {"": _generator_weights, "K4": _generator_k4_weights}[kind](6, side, 3)
    np.savez(tmp_path / "g.npz", *(x.astype(np.float32) for x in weights))
    network = getattr(models, f"KerasGenerator{kind}")(6, channels=3, side=side)
    load_keras(network, np.load(tmp_path / "g.npz").values())
    z = RNG.standard_normal((3, 6))
    expected = {"": generator, "K4": generator_k4}[kind](z, side, weights)
    assert expected.shape == (3, 4 * side, 4 * side, 3) and expected.std() > 0.1
    found = network.eval()(torch.from_numpy(z).float())
    np.testing.assert_allclose(_channels_last(found), expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["", "K4"])
def test_keras_critics(kind):
    weights = {"": _critic_weights, "K4": _critic_k4_weights}[kind](3, 12)
    network = load_keras(getattr(models, f"KerasDiscriminator{kind}")(12, channels=3), weights).eval()
    x = RNG.uniform(-1, 1, (4, 12, 12, 3))
    expected = {"": critic, "K4": critic_k4}[kind](x, weights)
    found = network(torch.from_numpy(x).float().permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_worked_out_by_hand():
    """One pixel through Conv2DTranspose k5 s2 "same": rows and columns 1 and 2 of the kernel. And back through Conv2D:
    of a kernel of 5 on 2 pixels the first of three padded ones is before."""
    kernel = np.arange(25.0).reshape(5, 5, 1, 1)
    assert conv_transpose(np.ones((1, 1, 1, 1)), kernel, 2)[0, :, :, 0].tolist() == [[6, 7], [11, 12]]
    assert conv(np.ones((1, 2, 2, 1)), kernel, 2).item() == 6 + 7 + 11 + 12


@pytest.mark.parametrize("name", ["KerasGenerator", "KerasGeneratorK4", "KerasDiscriminator", "KerasDiscriminatorK4"])
def test_the_same_as_stock_modules_and_keras_beginning(name):
    torch.manual_seed(0)
    draws = "Generator" in name
    model = getattr(models, name)(**({"latent": 8, "side": 2} if draws else {"size": 8}), channels=1)
    plain = getattr(models, name)(**({"latent": 8, "side": 2} if draws else {"size": 8}), channels=1)
    plain.main = nn.Sequential(*plain.main)
    plain.load_state_dict(models.keras_init(model).state_dict())
    assert_alike(model, plain, torch.randn(3, *((8,) if draws else (1, 8, 8))), steps=2)
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.2)} and len(norms) == 2 + draws
    for m in models.keras_init(model).modules():
        if isinstance(m, nn.Linear):
            bound = (6 / (m.in_features + m.out_features)) ** 0.5
            assert m.weight.abs().max() <= bound and (m.bias is None or not m.bias.any())


def test_keras_vae_784_16_8_2():
    shapes = [(784, 16), (16, 8), (8, 2), (8, 2), (2, 784)]
    w = [x for shape in shapes for x in (_draw(*shape), _draw(shape[1]))]
    vae = load_keras(models.MLPVAE(784, (16, 8), 2, decoder_hidden=()), w)
    x, z = RNG.uniform(0, 1, (3, 784)), RNG.standard_normal((3, 2))
    h = np.maximum(np.maximum(x @ w[0] + w[1], 0) @ w[2] + w[3], 0)
    mu, logvar = vae.encode(torch.from_numpy(x).float())
    for found, expected in ((mu, h @ w[4] + w[5]), (logvar, h @ w[6] + w[7])):
        np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-5)
    pictures = vae.decode(torch.from_numpy(z).float()).sigmoid().detach().numpy()
    np.testing.assert_allclose(pictures, 1 / (1 + np.exp(-(z @ w[8] + w[9]))), atol=1e-6)


def test_rmsprop_is_kerass():
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    model = nn.Module()
    model.weight = p
    optimizer = make_optimizer(model, VAEConfig(optimizer="rmsprop", lr=0.01))
    value, mean = p.detach().double().numpy(), np.zeros(2)
    for gradient in ([1.0, 0.5], [-2.0, 0.1], [0.3, 0.0]):
        p.grad = torch.tensor(gradient)
        optimizer.step()
        mean = 0.9 * mean + 0.1 * np.square(gradient)
        value = value - 0.01 * np.array(gradient) / (np.sqrt(mean) + 1e-7)
    np.testing.assert_allclose(p.detach().numpy(), value, rtol=1e-5)
    with pytest.raises(ValueError, match="weight-decay: expected 0 with --optimizer rmsprop"):
        make_optimizer(model, VAEConfig(optimizer="rmsprop", weight_decay=0.1))


def test_the_textbook_vae_resumes_bit_for_bit(tmp_path):
    config = VAEConfig(widths="16,8", decoder_widths="none", latent=2, optimizer="rmsprop", batch_size=16)
    x = torch.rand(16, 1, 28, 28)

    def begun(seed):
        torch.manual_seed(seed)
        vae = make("vae", config, (1, 28, 28), 0)
        return vae, make_optimizer(vae, config)

    vae, optimizer = begun(0)
    assert [tuple(p.shape) for p in vae.parameters() if p.dim() > 1] == [(16, 784), (8, 16), (2, 8), (2, 8), (784, 2)]
    step = Step(vae, optimizer)
    for _ in range(2):
        step(x)
    checkpoint.save(tmp_path, vae, optimizer, 2, {}, {})
    step(x)
    again, other = begun(1)
    checkpoint.restore(checkpoint.latest(tmp_path), again, other)
    Step(again, other)(x)
    assert type(other) is torch.optim.RMSprop
    assert all(map(torch.equal, again.state_dict().values(), vae.state_dict().values()))
    for widths in ("16,", "8,x", "0"):
        with pytest.raises(UsageError, match=f"--widths: expected whole numbers from 1, such as 16,8, got {widths}"):
            make("vae", VAEConfig(widths=widths), (1, 28, 28), 0)


def test_weights_that_do_not_fit_are_named():
    weights = _critic_weights(1, 8)
    network = models.KerasDiscriminator(8)
    before = [x.clone() for x in network.state_dict().values()]
    with pytest.raises(ValueError, match="expected 12 for KerasDiscriminator, got 11"):
        load_keras(network, weights[:-1])
    with pytest.raises(ValueError, match=r"expected shape \(5, 5, 1, 64\) of number 0, got \(5, 5, 3, 64\)"):
        load_keras(network, _critic_weights(3, 8))
    assert all(map(torch.equal, before, network.state_dict().values()))
    with pytest.raises(ValueError, match="KerasDiscriminatorK4: size: expected a multiple of 4, got 30"):
        models.KerasDiscriminatorK4(30)
