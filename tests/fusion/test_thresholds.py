"""Small tensors are left to PyTorch's own modules on the CPU; all sizes give the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from alike import assert_alike, assert_close, with_statistics
from torch import nn
from torch.autograd import forward_ad

from genai_fast import fuse, ops
from genai_fast.fusion import thresholds
from genai_fast.layers import RMSNorm


def _model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(8 * 64, 16),
        nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.0),
    )  # fmt: skip


def test_small_calls_go_to_the_modules(fused_calls):
    torch.manual_seed(0)
    plain, fused = _model(), fuse(_model())
    fused.load_state_dict(plain.state_dict())
    assert_alike(fused, plain, torch.randn(4, 3, 8, 8))
    assert not fused_calls


def test_large_calls_do_not(fused_calls):
    model = fuse(nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()))
    side = 8
    while side * side * 16 < thresholds.NORM_TRAINING_PLANES:
        side *= 2
    model(torch.randn(1, 16, side // 2, side - 1))
    assert not fused_calls
    model(torch.randn(1, 16, side, side))
    assert fused_calls == ["relu"]


def test_forward_mode_derivatives_are_torchs(small_is_fused):
    for training in (True, False):
        model = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh())).train(training)
        fused = fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh())).train(training)
        fused.load_state_dict(model.state_dict())
        x, v = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
        with torch.no_grad(), forward_ad.dual_level():
            found, expected = (forward_ad.unpack_dual(m(forward_ad.make_dual(x, v))).tangent for m in (fused, model))
        assert_close(found, expected)


@pytest.mark.parametrize("training", [True, False])
def test_batched_gradients_are_torchs(training, small_is_fused):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3))
    plain = with_statistics(model.train(training))
    fused = fuse(copy.deepcopy(plain))
    x = torch.randn(2, 2, 6, 6)
    jacobians = [torch.autograd.functional.jacobian(m, x, vectorize=True) for m in (fused, plain)]
    assert_close(*jacobians, 1e-4)
    gradients = []
    for model in (fused, plain):
        given = x.clone().requires_grad_()
        y = model(given)
        (batch,) = torch.autograd.grad(y, given, torch.eye(y.numel()).view(-1, *y.shape), is_grads_batched=True)
        gradients.append(batch)
    assert_close(*gradients, 1e-4)


def test_batched_gradients_with_dropout_are_repeated(small_is_fused):
    model = fuse(nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Dropout(0.5)))
    x = torch.randn(5, 4, requires_grad=True)
    y = model(x)
    ones = torch.ones(2, *y.shape)
    (batch,) = torch.autograd.grad(y, x, ones, is_grads_batched=True, retain_graph=True)
    (alone,) = torch.autograd.grad(y.sum(), x)
    assert_close(batch[0], alone)
    assert_close(batch[1], alone)


def test_small_norms_are_pytorchs(monkeypatch):
    monkeypatch.setattr(ops, "rms_norm", lambda *args: pytest.fail("called"))
    fused, x = fuse(nn.Sequential(nn.RMSNorm(8))), torch.randn(4, 8)
    assert isinstance(fused[0], RMSNorm)  # ours by class, PyTorch's by size
    assert torch.equal(fused(x), F.rms_norm(x, (8,), fused[0].weight))
