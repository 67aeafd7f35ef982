"""The variational recurrent network against plain PyTorch, step by step; its gradients; sampling."""

import pytest
import torch
from alike import assert_close, assert_gradients
from sequence_models import assert_capturable, assert_learns_alike, assert_near_bfloat16, gradients, load_both

from genai_fast import ops, use_backend
from genai_fast.models import VRNN
from genai_fast.models.vrnn.model import _Recurrence
from genai_fast.models.vrnn.plain import PlainVRNN

V = 11
SIZES = (V, 6, 10, 4)


def pair(**more):
    torch.manual_seed(0)
    return VRNN(*SIZES, **more), PlainVRNN(*SIZES, **more)


def tokens(seed=0, count=5, length=7):
    return torch.randint(V, (count, length), generator=torch.Generator().manual_seed(seed))


def given_noise(monkeypatch, peer, x, seed):
    """The peer draws what the model draws with this seed."""
    nothing = peer.cell.weight_hh.new_zeros(x.size(1), len(x), 4)
    noise = iter(ops.reparameterize(nothing, nothing, seed=seed))
    monkeypatch.setattr(peer, "reparameterize", lambda mu, logvar: mu + torch.exp(0.5 * logvar) * next(noise))


def test_it_learns_as_its_peer_does(monkeypatch):
    model, peer = pair()
    samples = [tokens(k) for k in range(2)]

    def theirs(step):
        given_noise(monkeypatch, peer, samples[step % 2], step)
        return peer.loss(samples[step % 2])

    assert_learns_alike(model, peer, lambda k: model.training_step(samples[k % 2], seed=k).loss, theirs, lr=1e-2)


def test_in_float64_loss_and_gradients_are_the_peers(monkeypatch):
    model, peer = (m.double() for m in pair(beta=0.7))
    load_both(model, peer)
    x = tokens()
    with use_backend("reference"):  # which serves float64
        given_noise(monkeypatch, peer, x, 4)
        found, expected = model.training_step(x, seed=4).loss, peer.loss(x)
        assert_close(found, expected.float(), 1e-7)
        assert_gradients(gradients(model, found), gradients(peer, expected), 1e-6)


def test_the_recurrences_gradients_are_its_derivatives():
    torch.manual_seed(1)
    units, latent, phi, hidden = 3, 2, 3, 2
    shapes = [
        (3, 2, units), (3, 2, 3 * hidden), (3, 2, latent), (2, hidden), (3 * hidden + units, hidden),
        (2 * latent, units), (2 * latent,), (phi, latent), (phi,), (3 * hidden, phi), (hidden,),
    ]  # fmt: skip
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_(k != 2) for k, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(_Recurrence.apply, inputs)


def test_the_terms_are_those_of_the_outputs():
    model, _ = pair(beta=0.3)
    x = tokens()
    found = model.training_step(x, x + 100, seed=1)  # y is not looked at
    logits, posterior, prior = model(x, seed=1)
    q, p = (torch.distributions.Normal(mu, torch.exp(0.5 * logvar)) for mu, logvar in (posterior, prior))
    assert_close(found.kl, torch.distributions.kl_divergence(q, p).sum() / 5)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.t().flatten(), reduction="sum") / 5
    assert_close(found.reconstruction, nats)
    assert_close(found.loss, nats + 0.3 * found.kl)
    assert found.tokens == 7


def test_later_tokens_change_nothing_earlier():
    model, _ = pair()
    x = tokens()
    before = model(x, seed=3)
    x[:, 4] = (x[:, 4] + 1) % V
    after = model(x, seed=3)
    assert torch.equal(before.logits[:4], after.logits[:4])
    assert torch.equal(before.prior[0][:5], after.prior[0][:5])  # z_5's prior knows x up to 4 alone
    assert (before.logits[4:] != after.logits[4:]).any(-1).all()


def test_a_posterior_of_the_prior_has_no_kl_and_another_has():
    model, _ = pair()
    for network in (model.prior, model.encoder):
        torch.nn.init.zeros_(network[2].weight)
        torch.nn.init.zeros_(network[2].bias)
    assert model.training_step(tokens(), seed=1).kl.abs() < 1e-5
    torch.nn.init.constant_(model.encoder[2].bias[:4], 2.0)
    assert model.training_step(tokens(), seed=1).kl.item() == pytest.approx(0.5 * 4 * 4 * 7, rel=1e-5)


def test_decoding_by_steps_is_the_whole_forward(monkeypatch):
    """With a posterior that is the prior, both draw the same z from the same noise."""
    model, _ = pair()
    with torch.no_grad():
        model.encoder[0].weight[:, :6] = 0.0
        model.encoder[0].weight[:, 6:] = model.prior[0].weight
        model.encoder[0].bias.copy_(model.prior[0].bias)
        model.encoder[2].load_state_dict(model.prior[2].state_dict())
    x = tokens()
    nothing = torch.zeros(7, 5, 4)
    noise = iter(ops.reparameterize(nothing, nothing, seed=9))
    monkeypatch.setattr(torch, "randn", lambda *args, **more: next(noise))
    state = model.decoder(5)
    found = torch.stack([state.step(ids) for ids in (None, *x.t()[:-1])])
    assert_close(found, model(x, seed=9).logits.detach(), 1e-5)


def test_samples_follow_what_was_learnt():
    torch.manual_seed(0)
    model = VRNN(6, 8, 24, 3)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for k in range(120):
        start = torch.randint(6, (32, 1), generator=torch.Generator().manual_seed(k))
        x = (start + torch.arange(8)) % 6  # each token is the one before plus 1
        loss = model.training_step(x).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss.item() < 0.4 * 8 * torch.tensor(6.0).log()
    x = model.sample(40, 10, seed=0)
    assert x.shape == (40, 10) and x.dtype is torch.int64
    assert ((x[:, 1:] - x[:, :-1]) % 6 == 1).float().mean() > 0.9
    assert len(x[:, 0].unique()) > 3
    assert torch.equal(x, model.sample(40, 10, seed=0)) and not torch.equal(x, model.sample(40, 10, seed=1))
    likeliest = [*model.generate_ids(torch.tensor([2, 3, 4]), lambda logits: logits.argmax(-1), longest=4, seed=0)]
    assert likeliest == [5, 0, 1, 2]
    assert [*model.generate_ids(torch.tensor([2, 3]), longest=9, end=0, seed=0)] == [4, 5]
    assert [*model.generate_ids(longest=10, seed=3)] == model.sample(1, 10, seed=3)[0].tolist()


def test_bfloat16_is_near():
    model, _ = pair()
    assert_near_bfloat16(model, lambda: model.training_step(tokens(), seed=1))


def test_a_step_can_be_captured(monkeypatch):
    assert_capturable(monkeypatch, lambda: VRNN(*SIZES), tokens(), tokens())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: VRNN(5, hidden=0), "hidden: expected at least 1, got 0"),
        (lambda: VRNN(5, beta=-0.5), "beta: expected at least 0, got -0.5"),
        (lambda: VRNN(5).training_step(tokens()), "x: expected token ids from 0 to 4, got 1?[0-9]; encode the text"),
        (lambda: VRNN(5).training_step(torch.zeros(3, dtype=torch.int64)), r"x: expected token ids \[B, T\], T >= 1"),
        (lambda: VRNN(5).sample(0, 4), "count: expected at least 1, got 0"),
        (lambda: VRNN(5).sample(2, 0), "longest: expected at least 1, got 0"),
    ],
)
def test_misuse_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()
