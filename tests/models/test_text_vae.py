"""The sentence VAE against plain PyTorch; padding, annealing, word dropout, collapse, decoding."""

import pytest
import torch
from alike import assert_close, assert_gradients
from sequence_models import assert_capturable, assert_learns_alike, assert_near_bfloat16, gradients, padded
from torch._subclasses.fake_tensor import DataDependentOutputException

from genai_fast import ops
from genai_fast.models import TextVAE
from genai_fast.models.common.generation import Sampler
from genai_fast.models.text_vae.plain import PlainTextVAE

V, END = 19, 18
SIZES = (V, END, 12, 16, 5)


def make(**more):
    torch.manual_seed(0)
    return TextVAE(*SIZES, **{"word_dropout": 0.0, **more})


def batch(lengths=(9, 3, 1, 6), seed=0, width=0):
    return padded(lengths, V, END, seed, width)


def test_it_learns_as_its_peer_does(monkeypatch):
    model, peer = make(annealing=15), PlainTextVAE(*SIZES, annealing=15, word_dropout=0.0)
    noise = {}
    monkeypatch.setattr(peer, "reparameterize", lambda mu, logvar: ops.reparameterize(mu, logvar, **noise))
    samples = [batch(seed=k) for k in range(2)]

    def theirs(step):
        noise["seed"] = step
        return peer.loss(*samples[step % 2])

    assert_learns_alike(model, peer, lambda k: model.training_step(*samples[k % 2], seed=k).loss, theirs)
    assert model.steps == peer.steps == 51


def test_the_terms_are_of_a_sequence():
    model = make(beta=0.3).eval()
    ids, lengths = batch()
    found = model.training_step(ids, lengths, seed=1)
    logits, kl, _ = model(ids, lengths, seed=1)
    nats = [torch.nn.functional.cross_entropy(logits[:n, k], ids[k, :n]) * n for k, n in enumerate(lengths.tolist())]
    assert_close(found.reconstruction, torch.stack(nats).mean())
    assert_close(found.kl, kl.mean())
    assert_close(found.loss, found.reconstruction + 0.3 * found.kl)
    assert found.tokens == 19 / 4


def test_what_lies_behind_a_sequence_is_nothing():
    model = make()
    ids, lengths = batch()
    expected = model.training_step(ids, lengths, seed=2).loss
    expected_gradients = gradients(model, expected)
    behind = torch.arange(ids.size(1)) >= lengths[:, None]
    ids[behind] = torch.randint(V, (int(behind.sum()),))
    found = model.training_step(ids, lengths, seed=2).loss
    assert torch.equal(found, expected)
    for name, g in gradients(model, found).items():
        assert torch.equal(g, expected_gradients[name]), name
    more = model.training_step(*batch(width=14), seed=2).loss
    assert_close(more, expected, 1e-6)
    assert_gradients(gradients(model, more), expected_gradients, 1e-5)


def test_a_later_token_changes_no_earlier_logits():
    model = make()
    ids, z = batch()[0], torch.randn(4, 5)
    before = model.logits(z, ids)
    ids[:, 5] = (ids[:, 5] + 1) % V
    after = model.logits(z, ids)
    assert torch.equal(before[:5], after[:5]) and (before[5:] != after[5:]).any(-1).all()
    assert (model.logits(z + 1, ids) != after).any(-1).all()


def test_decoding_by_steps_is_the_whole_forward():
    model, (ids, _), z = make(), batch(), torch.randn(4, 5)
    decoder = model.decoder(z)
    found = torch.stack([decoder.step(column) for column in ids.t()])
    assert_close(found, model.logits(z, ids).detach(), 1e-5)
    assert not found.requires_grad


def test_annealing_rises_to_beta_and_is_a_checkpoints():
    model, sample = make(beta=0.5, annealing=4), batch()
    weights = []
    for _ in range(6):
        found = model.training_step(*sample, seed=1)
        weights.append(((found.loss - found.reconstruction) / found.kl).item())
    assert weights == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5, 0.5], abs=1e-5)
    again = make(beta=0.5, annealing=4)
    again.load_state_dict(model.state_dict())
    assert again.steps == 6
    fresh = make(beta=0.5, annealing=4).eval()
    found = fresh.training_step(*sample, seed=1)
    assert_close(found.loss, found.reconstruction + 0.5 * found.kl)  # evaluation is not annealed, and counts nothing
    assert fresh.steps == 0


def test_free_bits_are_free():
    model, sample = make(free_bits=1e3), batch()
    found = model.training_step(*sample, seed=1)
    assert_close(found.loss, found.reconstruction + 1e3)
    (grad,) = torch.autograd.grad(found.loss - found.reconstruction, [model.fc_mu.weight], allow_unused=True)
    assert grad is None or not grad.any()
    found = model.eval().training_step(*sample, seed=1)
    assert_close(found.loss, found.reconstruction + found.kl)
    found = make(free_bits=1e-6).training_step(*sample, seed=1)
    assert_close(found.loss, found.reconstruction + found.kl)


def test_word_dropout_hides_words_in_training_alone():
    model, (ids, lengths) = make(word_dropout=1.0), batch()
    with_words = make()
    found = model(ids, lengths, seed=1)[0]
    z = ops.reparameterize(*model.encode(ids, lengths), seed=1)
    hidden = torch.full_like(ids, V)
    hidden[:, 0] = END
    assert_close(found, model.logits(z, hidden))
    assert_close(model.eval()(ids, lengths, seed=1)[0], with_words.eval()(ids, lengths, seed=1)[0])
    half = make(word_dropout=0.5)
    losses = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        losses.append(half.training_step(ids, lengths, seed=1).loss)
    assert losses[0] == losses[1] != losses[2]


def train(model, sample, steps=60):
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        found = model.training_step(*sample)
        adam.zero_grad()
        found.loss.backward()
        adam.step()
    return model.eval().training_step(*sample, seed=0)


def test_a_collapse_shows_in_kl():
    sample = batch((6, 7, 8, 5) * 4)
    free, collapsed = train(make(beta=0.01), sample), train(make(beta=30.0), sample)
    assert collapsed.kl < 0.1 < 10 < free.kl
    assert collapsed.reconstruction > 1.5 * free.reconstruction


def test_it_writes_again_what_it_has_learnt():
    sample = batch((6, 7, 8, 5))
    model = make(beta=0.0)
    train(model, sample, 100)
    ids, lengths = sample
    texts = [row[: n - 1].tolist() for row, n in zip(ids, lengths.tolist(), strict=True)]
    assert model.reconstruct(ids, lengths) == texts
    assert [*model.generate_ids(ids[1, :7])] == texts[1]
    between = model.interpolate(ids[0, :6], ids[2, :8], 5)
    assert len(between) == 5 and between[0] == texts[0] and between[-1] == texts[2]


def test_samples_are_the_seeds_and_the_choosers():
    model = make()
    one, same, other = (model.sample(3, longest=7, seed=s) for s in (1, 1, 2))
    assert one == same != other
    assert [*model.generate_ids(longest=7, seed=1)] == model.sample(1, longest=7, seed=1)[0]
    ids = iter([[3, 4], [5, END], [6, 8], [7, 9]])  # the second of two sequences ends first, and stays so
    assert model.decode(torch.zeros(2, 5), lambda logits: torch.tensor(next(ids)), longest=4) == [[3, 5, 6, 7], [4]]
    one, same, other = (model.sample(3, Sampler(seed=s), longest=7, seed=1) for s in (1, 1, 2))
    assert one == same != other


def test_bfloat16_is_near():
    model = make()
    assert_near_bfloat16(model, lambda: model.training_step(*batch(), seed=1))


def test_a_step_can_be_captured(monkeypatch):
    assert_capturable(monkeypatch, lambda: TextVAE(*SIZES, annealing=9, free_bits=0.1), *batch())


def test_what_cannot_be_captured_is_found(monkeypatch):
    class Reads(TextVAE):
        def training_step(self, ids, lengths):
            return super().training_step(ids[:, : int(lengths.max())], lengths)

    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        assert_capturable(monkeypatch, lambda: Reads(*SIZES), *batch())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: TextVAE(5, -1), r"end: expected a token id in \[0, 5\), got -1"),
        (lambda: TextVAE(5, 4, latent=0), "latent: expected at least 1, got 0"),
        (lambda: TextVAE(5, 4, beta=-1.0), "beta: expected at least 0, got -1.0"),
        (lambda: TextVAE(5, 4, word_dropout=1.5), r"word_dropout: expected a share in \[0, 1\], got 1.5"),
        (lambda: TextVAE(5, 4).training_step(*batch()), "ids: expected token ids from 0 to 4, got 18"),
        (lambda: make().training_step(batch()[0], torch.tensor([1, 0, 1, 1])), "lengths: expected 1 to 9, .* got 0"),
        (lambda: make().sample(2, longest=0), "longest: expected at least 1, got 0"),
    ],
)
def test_misuse_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()
