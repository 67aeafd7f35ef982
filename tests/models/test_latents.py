"""Paths between latents, and repaired images."""

import copy

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close

from genai_fast import data
from genai_fast.models import MLPVAE, ConditionalVAE, ConvVAE, slerp
from genai_fast.models.common.latents import inpaint

SMALL = {"channels": 1, "latent": 4, "widths": (6, 8)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _angle(a, b):
    return torch.acos(F.cosine_similarity(a, b, dim=-1).clamp(-1, 1))


def test_slerp_is_an_arc_at_an_even_pace():
    a, b = F.normalize(torch.randn(2, 6, 16, dtype=torch.float64), dim=-1)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    path = slerp(a, b, t[:, None])
    assert path.shape == (9, 6, 16)
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    torch.testing.assert_close(path.norm(dim=-1), torch.ones(9, 6, dtype=torch.float64))
    torch.testing.assert_close(_angle(path[1:-1], a), t[1:-1, None] * _angle(a, b), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slerp(a, b, 0.3), slerp(b, a, 0.7))


def test_slerp_of_draws_stays_at_their_length():
    a, b = torch.randn(2, 200)
    middle = slerp(a, b, 0.5)
    assert middle.norm() > 0.95 * min(a.norm(), b.norm()) > ((a + b) / 2).norm()
    assert slerp(a, b, torch.linspace(0, 1, 4)).shape == (4, 200)


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, 1.0 + 1e-7, 0.0])
def test_slerp_of_parallel_vectors_is_finite_and_so_are_its_gradients(factor):
    a = torch.randn(3, 8, requires_grad=True)
    b = (a.detach() * factor).requires_grad_()
    y = slerp(a, b, 0.25)
    y.sum().backward()
    assert y.isfinite().all() and a.grad.isfinite().all() and b.grad.isfinite().all()
    if factor:
        torch.testing.assert_close(y, 0.75 * a + 0.25 * b, rtol=1e-4, atol=1e-5)


def test_slerp_of_bfloat16_is_computed_in_float32():
    a, b = torch.randn(2, 5, 64).bfloat16()
    y = slerp(a, b, 0.4)
    assert y.dtype is torch.bfloat16 and torch.equal(y, slerp(a.float(), b.float(), 0.4).bfloat16())


@pytest.mark.parametrize("b", [torch.zeros(3), torch.zeros(4).double()])
def test_slerp_of_what_does_not_fit(b):
    with pytest.raises(ValueError, match=r"slerp: b: expected floats \[..., latent\] as a is, torch.float32 \(4,\)"):
        slerp(torch.zeros(4), b, 0.5)


def digits(count):
    images = data.load("digits").split(0.1, seed=0)[0]
    return images.batch(slice(0, count)).view(-1, 1, 8, 8), torch.as_tensor(images.labels[:count]).long()


def lower_half(x):
    mask = torch.zeros(len(x), 1, 8, 8, dtype=torch.bool)
    mask[:, :, 5:] = True
    return mask


# A model and how it is asked.
MODELS = {
    "bernoulli": lambda labels: (MLPVAE(64, 16, 3), {}),
    "gaussian": lambda labels: (MLPVAE(64, 16, 3, likelihood="gaussian"), {}),
    "conv": lambda labels: (ConvVAE(8, **SMALL), {}),
    "conditional": lambda labels: (ConditionalVAE(10, 8, **SMALL), {"labels": labels}),
}


@pytest.mark.parametrize("name", MODELS)
def test_inpainting_changes_the_missing_pixels_alone(name):
    x, labels = digits(6)
    model, given = MODELS[name](labels)
    x = 2 * x - 1 if model.signed else x
    mask = lower_half(x)
    next(model.children()).eval()  # a part is frozen
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    repaired = model.inpaint(x, mask, steps=5, **given)
    assert repaired.shape == x.shape and not repaired.requires_grad
    assert torch.equal(repaired[~mask], x[~mask]) and not torch.equal(repaired, x)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    # What is under the mask does not count, and images do not depend on each other.
    poisoned = torch.where(mask, torch.nan, x)
    assert torch.equal(model.inpaint(poisoned, mask, steps=5, **given), repaired)
    alone = model.inpaint(x[2:3], mask[2:3], steps=5, **{key: v[2:3] for key, v in given.items()})
    assert_close(alone, repaired[2:3], 1e-4)
    with torch.inference_mode():
        assert_close(model.inpaint(x.clone(), mask.clone(), steps=5, **given), repaired)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_inpainting_finds_the_likeliest_latent(likelihood):
    """Of a linear decoder, whose energy is convex: LBFGS in float64 finds the same."""
    x, (weight, bias) = digits(4)[0].double(), (torch.randn(5, 64).double(), torch.randn(64).double())
    mask = lower_half(x)
    log_p = F.mse_loss if likelihood == "gaussian" else F.binary_cross_entropy_with_logits
    z = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def energy():
        lbfgs.zero_grad()
        logits = (z @ weight + bias).view(x.shape)
        loss = log_p(logits[~mask], x[~mask], reduction="sum") + z.square().sum() / 2
        loss.backward()
        return loss

    lbfgs.step(energy)
    expected = (z @ weight + bias).view(x.shape)
    expected = torch.where(mask, expected.sigmoid() if likelihood == "bernoulli" else expected, x)

    def encode(images):
        assert images.isfinite().all()
        return torch.zeros(4, 5).double(), torch.zeros(4, 5).double()

    found = inpaint(encode, lambda z: z @ weight + bias, x, mask, likelihood=likelihood, steps=800, lr=0.02)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_start_is_filled_with_the_mean_of_what_is_known():
    x = torch.arange(32.0).view(1, 2, 4, 4)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2:, :] = True
    seen = []

    def encode(images):
        seen.append(images)
        return torch.zeros(1, 32), torch.zeros(1, 32)

    inpaint(encode, lambda z: z, torch.where(mask, torch.inf, x), mask, steps=0)
    assert torch.equal(seen[0][:, :, :2], x[:, :, :2])
    assert (seen[0][0, 0, 2:] == 3.5).all() and (seen[0][0, 1, 2:] == 19.5).all()


def test_inpainting_is_the_seeds():
    model, (x, _) = MLPVAE(64, 16, 3), digits(4)
    mask = lower_half(x)
    state = torch.get_rng_state()
    one, same, other = (model.inpaint(x, mask, steps=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(model.inpaint(x, mask, steps=3), model.inpaint(x, mask, steps=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_of_which_nothing_is_known_is_finite():
    model, (x, _) = ConvVAE(8, **SMALL), digits(2)
    assert model.inpaint(x, torch.ones(2, 1, 8, 8, dtype=torch.bool), steps=2).isfinite().all()


@pytest.mark.parametrize(
    ("x", "mask", "settings", "message"),
    [
        ((2, 1, 8, 8), torch.zeros(2, 1, 8, 8), {}, r"mask: expected bool \(2, 1, 8, 8\).*got torch.float32"),
        ((2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool), {}, r"mask: expected bool .*got torch.bool \(2, 8, 8\)"),
        ((2, 64), torch.zeros(2, 1, 8, 8, dtype=torch.bool), {}, r"x: expected images \[B, C, H, W\], got \(2, 64\)"),
        ((2, 1, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool), {"steps": -1}, r"steps: expected at least 0, got -1"),
    ],
)
def test_what_cannot_be_inpainted(x, mask, settings, message):
    with pytest.raises(ValueError, match=f"inpaint: {message}"):
        MLPVAE(64, 16, 3).inpaint(torch.zeros(x), mask, **settings)


def test_a_likelihood_that_is_unknown():
    x, mask = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"inpaint: likelihood: expected 'gaussian' or 'bernoulli', got 'poisson'"):
        inpaint(torch.flatten, torch.flatten, x, mask, likelihood="poisson")
