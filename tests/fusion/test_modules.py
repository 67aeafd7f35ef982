"""Modules with torch's constructors around the ops: PyTorch's results, and PyTorch's own where the ops do not serve."""

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close
from torch import nn

from genai_fast import explain, fuse, layers, ops

pytestmark = pytest.mark.usefixtures("small_is_fused")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """The shapes that ops.cross_entropy is called with."""
    made, own = [], ops.cross_entropy

    def called(logits, *args, **kwargs):
        made.append(logits.shape)
        return own(logits, *args, **kwargs)

    monkeypatch.setattr(ops, "cross_entropy", called)
    return made


def _both(ours, plain, x, *more):
    """Results and gradients of x and parameters, of both."""
    made = []
    for module in (ours, plain):
        leaf = x.detach().clone().requires_grad_()
        y = module(leaf, *more)
        made.append([y, *torch.autograd.grad(y.float().square().sum(), [leaf, *module.parameters()])])
    return zip(*made, strict=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(9, 5), (4, 7, 3), (2, 6, 3, 4), (5,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_is_pytorchs(shape, reduction, dtype, calls):
    settings = dict(ignore_index=2, reduction=reduction, label_smoothing=0.1)
    x = torch.randn(shape, dtype=dtype)
    target = torch.randint(0, x.size(min(1, x.dim() - 1)), shape[:1] + shape[2:] if len(shape) > 1 else ())
    weight = torch.rand(x.size(min(1, x.dim() - 1))).to(dtype) + 0.5
    for more in ({}, dict(weight=weight)):
        calls.clear()
        both = layers.CrossEntropyLoss(**settings, **more), nn.CrossEntropyLoss(**settings, **more)
        for a, b in _both(*both, x, target):
            assert a.dtype is b.dtype and a.shape == b.shape
            assert_close(a.float(), b.float(), 2e-2 if dtype is torch.bfloat16 else 1e-5)
        assert calls


def test_cross_entropy_leaves_the_rest_to_pytorch(calls):
    x, target = torch.randn(6, 4), torch.randint(0, 4, (6,))
    weight, shares = torch.rand(4), torch.softmax(torch.randn(6, 4), 1)
    with pytest.raises(RuntimeError, match=r"(?i)float"):  # as PyTorch says it
        layers.CrossEntropyLoss(weight.half())(x, target)
    with pytest.raises(RuntimeError, match="weight tensor"):
        layers.CrossEntropyLoss(weight[:3])(x, target)
    assert torch.equal(layers.CrossEntropyLoss()(x, shares), F.cross_entropy(x, shares))
    with pytest.raises(ValueError, match="batch_size"):
        layers.CrossEntropyLoss()(x, target[:3])
    assert not calls


def test_a_head_with_its_loss():
    head, plain = layers.LinearCrossEntropyLoss(8, 11, ignore_index=3, chunk=4), nn.Linear(8, 11)
    plain.load_state_dict(head.state_dict())
    x, target = torch.randn(2, 6, 8), torch.randint(0, 11, (2, 6))
    leaf = x.clone().requires_grad_()
    loss = F.cross_entropy(plain(leaf).flatten(0, 1), target.flatten(), ignore_index=3)
    expected = torch.autograd.grad(loss, [leaf, *plain.parameters()])
    mine = x.clone().requires_grad_()
    loss_of_ours = head(mine, target)
    assert_close(loss_of_ours, loss.detach(), 1e-5)
    for a, b in zip(torch.autograd.grad(loss_of_ours, [mine, *head.parameters()]), expected, strict=True):
        assert_close(a, b, 1e-5)
    assert torch.equal(head.logits(x), plain(x))


def test_a_vae_loss_and_its_sample():
    recon, target = torch.randn(4, 9), torch.rand(4, 9)
    mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
    losses = layers.VAELoss("gaussian", beta=2.0, reduction="sum")(recon, target, mu, logvar)
    expected = ops.vae_loss(recon, target, mu, logvar, likelihood="gaussian", beta=2.0, reduction="sum")
    assert torch.equal(losses.loss, expected.loss)
    torch.manual_seed(1)
    z, kl = layers.Reparameterize(kl=True)(mu, logvar)
    torch.manual_seed(1)
    assert torch.equal(layers.Reparameterize()(mu, logvar), z) and kl.shape == (4,)


@pytest.mark.parametrize(("cls", "function"), [(layers.SwiGLU, F.silu), (layers.GEGLU, F.gelu)])
def test_a_gated_mlp(cls, function):
    mlp, x = cls(6, 10, 5), torch.randn(3, 2, 6)
    gate, up = mlp.w12(x).chunk(2, -1)
    assert_close(mlp(x), mlp.w3(function(gate) * up), 1e-5)
    assert list(mlp.state_dict()) == ["w12.weight", "w12.bias", "w3.weight", "w3.bias"]


def test_dropout_after_an_activation():
    x = torch.randn(400, 500)
    dropout = layers.Dropout(0.25, activation="relu")
    y = dropout(x)
    kept = y != 0
    assert_close(y[kept], F.relu(x)[kept] / 0.75, 1e-6)
    assert abs(float(kept.sum() / (x > 0).sum()) - 0.75) < 0.01
    assert torch.equal(dropout.eval()(x), F.relu(x))
    assert layers.Dropout(0.5, inplace=True)(x).data_ptr() == x.data_ptr()
    with pytest.raises(ValueError, match="activation"):
        layers.Dropout(activation="sine")
    with pytest.raises(ValueError, match="inplace"):
        layers.Dropout(0.5, True, activation="relu")


def test_upsampling_and_convolution():
    ours, plain = layers.UpsampleConv2d(3, 5, activation="relu"), nn.Conv2d(3, 5, 3, padding=1)
    plain.load_state_dict(ours.state_dict())
    both = nn.Sequential(nn.Upsample(scale_factor=2), plain, nn.ReLU())
    for a, b in _both(ours, both, torch.randn(2, 3, 6, 7)):
        assert_close(a, b, 1e-5)


class _Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, tokens, targets=None):
        logits = self.head(self.embedding(tokens))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def test_fuse_serves_the_loss_that_a_method_or_a_module_computes(calls, monkeypatch):
    model, criterion = fuse(_Language()), fuse(nn.ModuleList([nn.CrossEntropyLoss()]))[0]
    assert any(row.becomes.startswith("cross_entropy") for row in explain(model))
    tokens = torch.randint(0, 9, (3, 5))
    logits, loss = model(tokens, tokens)
    assert_close(loss, F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), 1e-6)
    assert_close(criterion(logits.flatten(0, 1), tokens.flatten()), loss, 1e-6)
    assert len(calls) == 2 and model(tokens)[1] is None
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **settings: torch.ones(()))
    assert model(tokens, tokens)[1] == 1 and criterion(logits.flatten(0, 1), tokens.flatten()) == 1
    assert len(calls) == 2
