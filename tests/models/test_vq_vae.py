"""VQ-VAE and its prior: what they learn, what stays as it is, and that draws follow the probabilities."""

import pytest
import torch
import torch.nn.functional as F

from genai_fast import data
from genai_fast.models import VQGPT, VQVAE
from genai_fast.models.vq_vae.prior import _picked

TINY = {"channels": 1, "codebook": 32, "embedding": 8, "hidden": 16, "blocks": 1, "halvings": 1}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(model, *batch, steps=50, lr=5e-3):
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        model.training_step(*batch).loss.backward()
        adam.step()
    return model.eval()


@pytest.fixture(scope="module")
def digits():
    """Images [120, 1, 8, 8] in [-1, 1] of noughts and ones, and their labels."""
    images = data.load("digits")
    index = (images.labels < 2).nonzero().flatten()[:120]
    return images.batch(index, signed=True), images.labels[index]


@pytest.fixture(scope="module")
def vq(digits):
    torch.manual_seed(0)
    return trained(VQVAE(8, **TINY), digits[0])


def test_it_learns_codes(vq, digits):
    x, _ = digits
    codes = vq.codes(x)
    assert codes.shape == (120, 4, 4) and codes.dtype is torch.int64
    assert len(codes.unique()) > 16  # codes that are not used are replaced
    error = F.mse_loss(vq.reconstruct(x), x)
    assert error < 0.35 * F.mse_loss(x.mean(0).expand_as(x), x)
    assert torch.equal(vq.decode_codes(codes), vq.reconstruct(x))
    losses = vq.training_step(x)
    assert losses.reconstruction.item() == pytest.approx(64 * F.mse_loss(vq(x), x).item(), rel=1e-4)
    assert losses.loss.item() == pytest.approx((losses.reconstruction + losses.commitment).item())
    assert 1 < losses.codes_used <= 32


def test_a_plane_of_codes_has_the_side_that_is_asked_for():
    assert VQVAE(64, **TINY | {"halvings": 3}).codes(torch.zeros(2, 1, 64, 64)).shape == (2, 8, 8)
    for sizes in ({"size": 28, "halvings": 3}, {"size": 2, "halvings": 2}):
        with pytest.raises(ValueError, match=r"VQVAE: size: expected a multiple of \d"):
            VQVAE(**TINY | sizes)
    with pytest.raises(ValueError, match="expected images"):
        VQVAE(8, **TINY).codes(torch.zeros(2, 1, 16, 16))


@pytest.fixture(scope="module")
def prior(vq, digits):
    torch.manual_seed(0)
    model = VQGPT(8, 2, **TINY, layers=2, heads=2, width=32)
    model.vq.load_state_dict(vq.state_dict())
    return trained(model, *digits, steps=80).train()


def test_the_prior_leaves_the_codes_as_they_are(vq, prior):
    state = vq.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in prior.vq.state_dict().items())
    assert prior.training and not any(m.training for m in prior.vq.modules())


def test_the_class_decides_what_is_drawn(prior, digits):
    """The nearest class mean tells noughts from ones."""
    x, labels = digits
    means = torch.stack([x[labels == k].mean(0) for k in range(2)]).flatten(1)
    wanted = torch.arange(60) % 2
    images = prior.sample(60, seed=3)
    found = torch.cdist(images.flatten(1), means).argmin(1)
    assert (found == wanted).float().mean() > 0.9
    assert torch.equal(images, prior.sample(60, wanted, seed=3)) and not torch.equal(images, prior.sample(60, seed=4))
    assert torch.equal(images[:5], prior.sample(5, seed=3)) and prior.sample(0).shape == (0, 1, 8, 8)
    with pytest.raises(ValueError, match="labels: expected 0 to 1, got 2"):
        prior.sample(1, torch.tensor([2]))


def test_codes_are_drawn_by_the_probabilities_of_forward(prior):
    """The decoder that keeps keys and values picks what the whole forward would."""
    z, labels = torch.randn(7, 16), torch.arange(7) % 2
    codes = prior.codes_of(z, labels).flatten(1)
    with torch.no_grad():
        logits = prior.eval().gpt(prior._tokens(codes, labels))[..., :32]
    expected = torch.stack([_picked(logits[:, k], z[:, k]) for k in range(16)], 1)
    assert torch.equal(codes, expected)


def test_a_pick_is_the_inverse_of_the_distribution():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0])
    places = (torch.arange(20000) + 0.5) / 20000
    z = torch.special.ndtri(places.double()).float()
    share = _picked(logits.expand(20000, -1), z).bincount(minlength=5) / 20000
    torch.testing.assert_close(share, logits.softmax(0), rtol=0, atol=2e-4)
    assert _picked(logits.expand(2, -1), torch.tensor([torch.inf, -torch.inf])).tolist() == [4, 0]
