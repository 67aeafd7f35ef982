"""The LSTM language model: its peer's numbers, and a state that goes on where it should."""

import copy

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close, assert_gradients, gradients

from genai_fast.models.lstm import LSTMLanguageModel
from genai_fast.models.lstm.plain import PlainLSTMLanguageModel
from genai_fast.optim import Adam

SIZES = dict(vocabulary=31, embedding=16, hidden=24, layers=2)


def small(seed=0, **options):
    torch.manual_seed(seed)
    return LSTMLanguageModel(**{**SIZES, **options})


def pair(**options):
    model, peer = small(**options), PlainLSTMLanguageModel(**{**SIZES, **options})
    peer.load_state_dict(model.state_dict())
    return model, peer


def stream(pieces=4, rows=3, tokens=9, seed=1):
    """(x, y, carry) of a text cut into pieces, one behind the other; the third begins anew in its second row."""
    ids = torch.randint(31, (rows, pieces * tokens + 1), generator=torch.Generator().manual_seed(seed))
    for piece in range(pieces):
        start = piece * tokens
        carry = torch.ones(rows)
        if piece == 0:
            carry.zero_()
        if piece == 2:
            carry[1] = 0
        yield ids[:, start : start + tokens], ids[:, start + 1 : start + tokens + 1], carry


def test_keys_are_the_usual_ones_and_weights_load_both():
    model, peer = pair()
    model.load_state_dict(peer.state_dict())
    lstm = [f"lstm.{kind}_{of}_l{k}" for k in range(2) for kind in ("weight", "bias") for of in ("ih", "hh")]
    assert [*model.state_dict()] == ["encoder.weight", *lstm, "decoder.weight", "decoder.bias"]
    assert [*model.state_dict()] == [*peer.state_dict()]


@pytest.mark.parametrize("layers", [1, 2])
def test_losses_and_gradients_over_a_stream_are_the_peers(layers):
    model, peer = pair(layers=layers)
    for x, y, carry in stream():
        y = y.clone()
        y[0, 0] = -100
        losses, expected = model.training_step(x, y, carry), peer.loss(x, y, carry)
        assert losses.loss.dtype == torch.float32 and losses.loss.shape == ()
        assert_close(losses.loss, expected)
        assert_gradients(gradients(model, losses.loss), gradients(peer, expected))


def test_it_learns_as_the_peer_does():
    model, peer = pair()
    curves = []
    for m, loss, adam in (
        (model, lambda *piece: model.training_step(*piece).loss, Adam(model.parameters(), lr=3e-2)),
        (peer, peer.loss, torch.optim.Adam(peer.parameters(), lr=3e-2)),
    ):
        curve = []
        for _ in range(13):
            for piece in stream():
                found = loss(*piece)
                m.zero_grad()
                found.backward()
                adam.step()
                curve.append(found.detach())
        curves.append(torch.stack(curve))
    torch.testing.assert_close(curves[0], curves[1], rtol=2e-4, atol=0)
    assert curves[0][-4:].mean() < 0.9 * curves[0][:4].mean()


def test_pieces_are_the_whole_text():
    """A carried state makes of the pieces' losses that of the text at once; one that is not carried does not."""
    model = small()
    pieces = [(x, y) for x, y, _ in stream()]
    x, y = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
    carry = torch.ones(3)
    with torch.no_grad():
        logits, _ = model(x)
        whole = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        carried = [model.training_step(*piece, carry).loss for piece in pieces]
        model.forget()
        anew = [model.training_step(*piece, 0 * carry).loss for piece in pieces]
    assert_close(torch.stack(carried).mean(), whole)
    assert abs(torch.stack(anew).mean() - whole) > 1e-4


def test_carry_forgets_its_row_alone():
    model = small()
    x, y, ones = next(stream())[0], next(stream())[1], torch.ones(3)
    with torch.no_grad():
        model.training_step(x, y, ones)
        before = model.carried()
        model.h[:, 2] = torch.nan  # as after a step that went wrong
        model.training_step(x, y, torch.tensor([1.0, 0.0, 0.0]))
        found = model.carried()
        _, (h, c) = model(x)
        _, going_on = model(x, (before["h"], before["c"]))
    assert_close(found["h"][:, 1:], h[:, 1:])
    assert_close(found["c"][:, 1:], c[:, 1:])
    assert_close(found["h"][:, :1], going_on[0][:, :1])
    assert not torch.equal(found["h"][:, 0], h[:, 0])


def test_no_gradient_flows_through_the_carried_state():
    model = small()
    pieces = list(stream())
    first = model.training_step(*pieces[0])
    second = model.training_step(*pieces[1]).loss
    assert not model.h.requires_grad
    alone = small()
    alone.load_carried(model_state_after(pieces[0]))
    assert_gradients(gradients(model, second), gradients(alone, alone.training_step(*pieces[1]).loss), 1e-5)
    first.loss.backward()  # its graph is its own


def model_state_after(piece):
    model = small()
    model.training_step(*piece)
    return model.carried()


def test_carried_goes_on_exactly():
    model, pieces = small(), list(stream())
    model.training_step(*pieces[0])
    state, expected = model.carried(), [model.training_step(*piece).loss for piece in pieces[1:]]
    resumed = small()
    resumed.load_carried(state)
    assert [resumed.training_step(*piece).loss for piece in pieces[1:]] == expected
    model.load_carried(state)  # of the same shape: into the memory that is there
    assert [model.training_step(*piece).loss for piece in pieces[1:]] == expected
    assert not any(name == "h" or name == "c" for name in model.state_dict())


def test_the_state_keeps_its_memory():
    model, pieces = small(), list(stream())
    model.training_step(*pieces[0])
    held = model.h.data_ptr(), model.c.data_ptr()
    for piece in pieces[1:]:
        model.training_step(*piece)
    model.load_carried(model.carried())
    model.forget()
    assert held == (model.h.data_ptr(), model.c.data_ptr())
    assert not model.h.any() and not model.c.any()


def test_another_batch():
    model, pieces = small(), list(stream())
    model.training_step(*pieces[0])
    before = model.carried()
    x, y, carry = (part[:2] for part in pieces[1])
    model.training_step(x, y, carry)
    assert torch.equal(model.h[:, 2], before["h"][:, 2]) and not torch.equal(model.h[:, :2], before["h"][:, :2])
    x, y, carry = (torch.cat([part, part[:2]]) for part in pieces[1])
    model.training_step(x, y, carry)
    assert model.carried()["c"].shape == (2, 5, 24)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_evaluation_leaves_training_alone(guard):
    model, pieces = small(), list(stream())
    model.training_step(*pieces[0])
    before = model.carried()
    runs = []
    for _ in range(2):  # .eval() forgets what the evaluation before it left
        model.eval()
        with guard():
            runs.append([model.training_step(x, y, torch.ones(3)).loss.item() for x, y, _ in pieces])
        model.train()
    assert runs[0] == runs[1]
    with guard():
        anew = [model.eval().training_step(x, y, torch.ones(3)).loss.item() for x, y, _ in pieces]
    assert anew[0] == runs[0][0] and anew[1] != runs[0][1]  # within an evaluation the state goes on
    model.train()
    assert all(torch.equal(model.carried()[name], before[name]) for name in before)
    model.training_step(*pieces[1])  # training goes on as if nothing had been


def test_dropout_is_of_training_alone_and_repeats():
    model, peer = pair(dropout=0.4)
    x, y, carry = next(stream())
    assert_close(model.eval()(x)[0], peer.eval()(x)[0])
    model.train()
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(model.training_step(x, y, carry).loss)
    assert losses[0] == losses[1] != losses[2]
    assert all(g.abs().sum() > 0 for g in gradients(model, losses[0]).values())


def test_under_autocast():
    model, peer = pair()
    for piece in stream(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.training_step(*piece).loss
        assert loss.dtype == torch.float32
        assert_close(loss, peer.loss(*piece), 2e-2)
    assert model.h.dtype == torch.float32
    assert all(g.isfinite().all() for g in gradients(model, loss).values())


def test_copies_and_moves():
    model = small()
    model.training_step(*next(stream()))
    other = copy.deepcopy(model)
    assert torch.equal(other.h, model.h) and other.h.data_ptr() != model.h.data_ptr()
    assert other.double().h.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(layers=0), "layers: expected at least 1, got 0"),
        (lambda: small(dropout=-0.1), "dropout: expected 0 <= dropout < 1, got -0.1"),
        (lambda: small()(torch.full((1, 2), 31)), "expected token ids from 0 to 30, got 31; encode the text"),
        (
            lambda: small().training_step(*next(stream())[:2], torch.ones(4)),
            r"carry: expected shape \(3,\), one number for each row of x, got \(4,\)",
        ),
        (lambda: small().load_carried({"h": torch.zeros(2, 3, 24)}), r"c: expected \[2, B, 24\], .* got none"),
        (
            lambda: small().load_carried({"h": torch.zeros(2, 3, 24), "c": torch.zeros(2, 4, 24)}),
            r"c: expected \[2, B, 24\], B alike in both, got \(2, 4, 24\)",
        ),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
