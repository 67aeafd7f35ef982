"""The VAE on fused ops against the same as its authors write it."""

import pytest
import torch

from genai_fast import data, ops, use_backend
from genai_fast.models import MLPVAE
from genai_fast.models.vae.plain import PlainMLPVAE

KEYS = [f"{layer}.{name}" for layer in ("fc1", "fc21", "fc22", "fc3", "fc4") for name in ("weight", "bias")]


def digits(count: int = 64) -> torch.Tensor:
    return data.load("digits").split(0.1, seed=0)[0].batch(slice(0, count))


def test_keys_are_the_classic_ones_and_weights_load_both():
    model, peer = MLPVAE(64, 32, 5), PlainMLPVAE(64, 32, 5)
    assert list(model.state_dict()) == list(peer.state_dict()) == KEYS
    peer.load_state_dict(model.state_dict())
    model.load_state_dict(peer.state_dict())
    assert sum(p.numel() for p in MLPVAE().parameters()) == 652824  # 784-400-(20, 20)-400-784


def test_several_hidden_layers():
    shapes = {name: tuple(p.shape) for name, p in MLPVAE(784, (16, 8), 2, decoder_hidden=()).state_dict().items()}
    assert [shapes[f"{name}.weight"] for name in ("fc1", "deeper.0", "fc21", "fc22", "fc4")] == [
        (16, 784), (8, 16), (2, 8), (2, 8), (784, 2),
    ]  # fmt: skip
    assert len(shapes) == 10
    shapes = {name: tuple(p.shape) for name, p in MLPVAE(784, [16, 8], 2).state_dict().items()}
    assert [shapes[f"{name}.weight"] for name in ("fc3", "wider.0", "fc4")] == [(8, 2), (16, 8), (784, 16)]


@pytest.mark.parametrize("hidden, decoder", [(32, None), ((16, 8), ()), ((16, 8), None), (16, (4, 8, 16))])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_loss_and_gradients_are_the_authors(likelihood, hidden, decoder, monkeypatch):
    torch.manual_seed(0)
    model = MLPVAE(64, hidden, 5, likelihood=likelihood, decoder_hidden=decoder).double()
    peer = PlainMLPVAE(64, hidden, 5, likelihood, decoder).double()
    x = digits().double()
    peer.load_state_dict(model.state_dict())
    # One noise for both.
    monkeypatch.setattr(peer, "reparameterize", lambda mu, logvar: ops.reparameterize(mu, logvar, seed=3))
    with use_backend("reference"):  # which serves float64
        recon, mu, logvar = model(x, seed=3)
        ours = ops.vae_loss(recon, x.flatten(1), mu, logvar, likelihood=likelihood, reduction="sum").loss
        theirs = peer.loss(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        ours.backward()
        theirs.backward()
    for (name, p), q in zip(model.named_parameters(), peer.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-11 * q.grad.norm(), name


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_training_step_is_the_mean_elbo(likelihood):
    model, x = MLPVAE(64, 32, 5, beta=0.5, likelihood=likelihood), digits()
    torch.manual_seed(7)
    losses = model.training_step(x)
    torch.manual_seed(7)
    recon, mu, logvar = model(x)
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1).mean()
    if likelihood == "bernoulli":
        error = torch.nn.functional.binary_cross_entropy(recon.sigmoid(), x.flatten(1), reduction="sum") / len(x)
    else:
        error = ((recon - x.flatten(1)) ** 2).sum(1).mean()
    torch.testing.assert_close(losses.kl, kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.reconstruction, error, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.loss, error + 0.5 * kl, rtol=1e-4, atol=1e-5)


def test_it_learns_real_digits():
    torch.manual_seed(0)
    model, x = MLPVAE(64, 64, 4), digits(512)
    adam = torch.optim.Adam(model.parameters(), lr=5e-3)
    first = model.training_step(x).loss.item()
    for _ in range(80):
        adam.zero_grad()
        model.training_step(x).loss.backward()
        adam.step()
    assert model.training_step(x).loss.item() < 0.75 * first
    blurred = x.mean(0, keepdim=True).expand_as(x)
    assert (model.reconstruct(x) - x).square().mean() < 0.8 * (blurred - x).square().mean()
    spread = torch.pdist(model.sample(64, seed=0)).mean() / torch.pdist(x[:64].flatten(1)).mean()
    assert 0.3 < spread < 1.2  # samples differ from each other about as digits do


def test_samples_are_the_seeds():
    model = MLPVAE(64, 32, 5)
    one, same, other = (model.sample(9, seed=s) for s in (1, 1, 2))
    assert one.shape == (9, 64) and one.min() >= 0 and one.max() <= 1 and not one.requires_grad
    assert torch.equal(one, same) and not torch.equal(one, other)
    state = torch.get_rng_state()
    model.sample(3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # a seeded draw leaves the training's generator alone
    torch.manual_seed(4)
    drawn = model.sample(3)
    torch.manual_seed(4)
    assert torch.equal(drawn, model.sample(3))


def test_reconstructions_have_the_shape_of_what_they_reconstruct():
    x = digits(6)
    out = MLPVAE(64, 32, 5, likelihood="gaussian").reconstruct(x)
    assert out.shape == x.shape == (6, 1, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPVAE(hidden=()), "hidden: expected at least 1, got 0"),
        (lambda: MLPVAE(decoder_hidden=(3, 0)), "decoder_hidden: expected at least 1, got 0"),
        (lambda: MLPVAE(latent=0), "latent: expected at least 1, got 0"),
        (lambda: MLPVAE(likelihood="poisson"), "likelihood: expected 'bernoulli' or 'gaussian', got 'poisson'"),
        (lambda: MLPVAE().training_step(digits()), "expected 784 values a sample, got 64; remedy: input_size=64"),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
