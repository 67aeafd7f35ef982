"""The encoder-decoder Transformer against plain PyTorch; padding, causality, decoding by steps."""

import pytest
import torch
from alike import assert_close, assert_gradients
from sequence_models import assert_capturable, assert_learns_alike, assert_near_bfloat16, gradients, load_both, padded

from genai_fast.models import Seq2Seq
from genai_fast.models.seq2seq.plain import PlainSeq2Seq

V, END = 23, 22
SIZES = (V, END, 16, 2, 2, 16)


def pair(dropout=0.0):
    torch.manual_seed(0)
    return Seq2Seq(*SIZES, dropout=dropout), PlainSeq2Seq(*SIZES, dropout=dropout)


def batch(source=(7, 1, 5), target=(4, 6, 1), seed=0, widths=(0, 0)):
    return *padded(source, V, END, seed, widths[0]), *padded(target, V, END, seed + 1, widths[1])


def test_it_learns_as_its_peer_does():
    model, peer = pair()
    samples = [batch(seed=2 * k) for k in range(2)]
    assert_learns_alike(
        model, peer, lambda k: model.training_step(*samples[k % 2]).loss, lambda k: peer.loss(*samples[k % 2])
    )


def test_losses_are_a_token_and_a_sequence():
    model, _ = pair()
    source, source_lengths, target, target_lengths = batch()
    found = model.training_step(source, source_lengths, target, target_lengths)
    given = torch.cat([torch.full((3, 1), END), target[:, :-1]], 1)
    logits = model(source, source_lengths, given)
    pairs = [(logits[k, :n], target[k, :n]) for k, n in enumerate(target_lengths.tolist())]
    nats = sum(torch.nn.functional.cross_entropy(*pair, reduction="sum") for pair in pairs)
    assert_close(found.nats, nats / 3)
    assert_close(found.loss, nats / 11)
    assert found.tokens == 11 / 3 and found.tokens.dtype is torch.float32


def test_what_lies_behind_a_sequence_is_nothing():
    model, _ = pair()
    source, source_lengths, target, target_lengths = batch()
    expected = model.training_step(source, source_lengths, target, target_lengths).loss
    expected_gradients = gradients(model, expected)
    for x, lengths in ((source, source_lengths), (target, target_lengths)):
        behind = torch.arange(x.size(1)) >= lengths[:, None]
        assert behind.any()
        x[behind] = torch.randint(V, (int(behind.sum()),))
    found = model.training_step(source, source_lengths, target, target_lengths).loss
    assert torch.equal(found, expected)
    for name, g in gradients(model, found).items():
        assert torch.equal(g, expected_gradients[name]), name


@pytest.mark.parametrize("widths", [(13, 0), (0, 9), (16, 16)])
def test_more_padding_changes_nothing(widths):
    model, _ = pair()
    losses = [model.training_step(*x) for x in (batch(), batch(widths=widths))]
    expected, found = (gradients(model, loss.loss) for loss in losses)
    for a, b in zip(*losses, strict=True):
        assert_close(b, a, 1e-6)
    assert_gradients(found, expected, 1e-5)


def test_each_sample_is_as_it_is_alone():
    model, _ = pair()
    source, source_lengths, target, target_lengths = batch()
    together = model(source, source_lengths, target)
    for k, (n, m) in enumerate(zip(source_lengths.tolist(), target_lengths.tolist(), strict=True)):
        alone = model(source[k : k + 1, :n], source_lengths[k : k + 1], target[k : k + 1, :m])
        assert_close(together[k : k + 1, :m], alone, 1e-5)


def test_a_later_token_changes_no_earlier_logits_and_the_source_all():
    model, _ = pair()
    source, source_lengths, ids, _ = batch(source=(7, 7, 7))
    before = model(source, source_lengths, ids)
    ids[:, 3] = (ids[:, 3] + 1) % V
    after = model(source, source_lengths, ids)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(-1).all()
    source[:, 6] = (source[:, 6] + 1) % V  # the encoder looks ahead
    assert (model.encode(source, source_lengths).states[:, 0] != 0).any()
    assert (model(source, source_lengths, ids) != after).any(-1).all()


def test_decoding_by_steps_is_the_whole_forward():
    model, _ = pair(dropout=0.5)
    source, source_lengths, ids, _ = batch()
    model.eval()
    expected = model(source, source_lengths, ids)
    decoder = model.decoder(model.encode(source, source_lengths))
    model.train()  # a decoder drops nothing
    found = torch.stack([decoder.step(column) for column in ids.t()], 1)
    assert_close(found, expected.detach(), 1e-5)
    assert not found.requires_grad


def test_it_writes_what_it_has_learnt_or_what_is_chosen():
    torch.manual_seed(0)
    model = Seq2Seq(V, END, 8, 1, 2, 32)
    pairs = batch((5, 3, 4, 6), (4, 6, 1, 8))
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model.training_step(*pairs).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    source, source_lengths, target, target_lengths = pairs
    for k, (n, m) in enumerate(zip(source_lengths.tolist(), target_lengths.tolist(), strict=True)):
        assert [*model.generate_ids(source[k, :n])] == target[k, : m - 1].tolist()
    prompt = source[1, :3]
    assert [*model.generate_ids(prompt, longest=2)] == target[1, :2].tolist()
    assert model.training  # as it was
    seen = []

    def least(logits):
        seen.append(logits.shape)
        return logits[:, :END].argmin(-1)

    assert len([*model.generate_ids(prompt, least)]) == 8 == len(seen) and {*seen} == {(1, V)}


def test_dropout_is_for_training_alone():
    model, peer = pair(dropout=0.5)
    load_both(model, peer)
    losses = [model.training_step(*batch()).loss for _ in range(2)]
    assert losses[0] != losses[1]
    torch.manual_seed(3)
    first = model.training_step(*batch()).loss
    torch.manual_seed(3)
    assert torch.equal(first, model.training_step(*batch()).loss)
    assert_close(model.eval().training_step(*batch()).loss, peer.eval().loss(*batch()))


def test_bfloat16_is_near():
    model, _ = pair()
    assert_near_bfloat16(model, lambda: model.training_step(*batch()))


def test_the_encoder_compiles_whole():
    torch.manual_seed(0)
    model, (source, lengths, _, _) = Seq2Seq(V, END, 16, 1, 2, 16).eval(), batch()
    compiled = torch.compile(lambda *x: model.encode(*x).states, fullgraph=True, backend="eager")
    found, expected = (states(source, lengths) for states in (compiled, lambda *x: model.encode(*x).states))
    assert_close(found, expected.detach())
    assert_gradients(gradients(model, found.square().sum()), gradients(model, expected.square().sum()), 1e-4)


def test_a_step_can_be_captured(monkeypatch):
    assert_capturable(monkeypatch, lambda: Seq2Seq(*SIZES, dropout=0.1), *batch())


def encoded(lengths):
    return pair()[0].encode(torch.zeros(2, 3, dtype=torch.int64), lengths)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Seq2Seq(9, 9), r"end: expected a token id in \[0, 9\), got 9"),
        (lambda: Seq2Seq(9, 8, heads=3, width=16), "heads: expected a divisor of width 16, got 3"),
        (lambda: pair()[0].generate_ids(torch.zeros(3), longest=0), "longest: expected at least 1, got 0"),
        (lambda: Seq2Seq(9, 8, layers=0), "layers: expected at least 1, got 0"),
        (lambda: Seq2Seq(9, 8, dropout=1.0), r"dropout: expected a share in \[0, 1\), got 1.0"),
        (lambda: pair()[0].training_step(*batch(source=(17, 2, 3))), "source: expected at most block = 16 tokens"),
        (lambda: Seq2Seq(9, 8).training_step(*batch()), "expected token ids from 0 to 8, got 2.; encode the text"),
        (lambda: encoded(torch.tensor([4, 1])), "source lengths: expected 1 to 3, .* got 4"),
        (lambda: encoded(torch.ones(2)), r"source lengths: expected integers \[2\], one a sequence, got torch.float32"),
        (lambda: pair()[0].generate_ids(torch.zeros(1, 3)), r"prompt: expected token ids \[T\] of one"),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_decoder_has_room_for_block_tokens():
    model, _ = pair()
    decoder = model.decoder(model.encode(*batch()[:2]))
    for _ in range(16):
        decoder.step(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="at most block = 16 tokens"):
        decoder.step(torch.tensor([1, 2, 3]))
