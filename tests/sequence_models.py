"""What is asked of every model of sequences."""

import torch
from alike import assert_close, assert_gradients, gradients
from torch._subclasses.fake_tensor import FakeTensorMode


def padded(lengths, vocabulary, end, seed=0, width=0):
    """Random sequences, each with `end` last and padded with it: (ids [B, T], lengths [B])."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    ids = torch.randint(vocabulary, (len(lengths), int(lengths.max())), generator=generator)
    ids[ids == end] = (end + 1) % vocabulary
    ids = torch.nn.functional.pad(ids, (0, max(0, width - ids.size(1))))
    ids[torch.arange(ids.size(1)) >= (lengths - 1)[:, None]] = end
    return ids, lengths


def load_both(ours, peer):
    assert [*ours.state_dict()] == [*peer.state_dict()]
    peer.load_state_dict(ours.state_dict())
    ours.load_state_dict(peer.state_dict())


def assert_learns_alike(ours, peer, our_loss, peer_loss, steps=50, lr=5e-3):
    """Loss and gradients, then the losses of a training, from the same weights; our_loss(step) and peer_loss(step)."""
    load_both(ours, peer)
    found, expected = our_loss(0), peer_loss(0)
    assert_close(found, expected, what="loss")
    assert_gradients(gradients(ours, found), gradients(peer, expected), 1e-4)
    curves = []
    for model, loss_of in ((ours, our_loss), (peer, peer_loss)):
        # A large eps: a gradient that is 0 but for rounding must not become a step of the full length.
        adam, curve = torch.optim.Adam(model.parameters(), lr=lr, eps=1e-3), []
        for step in range(steps):
            loss = loss_of(step)
            adam.zero_grad()
            loss.backward()
            adam.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    assert_close(*curves, 2e-4, what="losses of the training")
    assert curves[0][-5:].mean() < 0.95 * curves[0][0]


def assert_capturable(monkeypatch, make, *batch):
    """A training step of tensors without values, as a compiler sees it, forward and backward: reading one, or a shape
    that depends on one, raises. Either would stop the capture of a CUDA graph."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # checks of values on the CPU are left out then
    with FakeTensorMode():
        model = make()
        losses = model.training_step(*(torch.empty(x.shape, dtype=x.dtype) for x in batch))
        losses.loss.backward()
    assert all(x.shape == () and x.dtype is torch.float32 for x in losses)
    assert all(p.grad is not None for p in model.parameters())


def assert_near_bfloat16(model, step):
    """Under autocast: the losses stay float32, and they and the gradients are near those of float32."""
    losses = step()
    expected = gradients(model, losses.loss)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = step()
    assert not torch.equal(narrow.loss, losses.loss)
    for a, b in zip(narrow, losses, strict=True):
        assert_close(a, b, 2e-2)
    assert_gradients(gradients(model, narrow.loss), expected, 0.1)
