"""Every activation that fuse knows, as a module and as a function, after a norm, before a dropout, folded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import explain, fuse
from genai_fast.fusion import thresholds

MODULES = {
    "elu": lambda: nn.ELU(),
    "elu_alpha": lambda: nn.ELU(0.4),
    "elu_negative_alpha": lambda: nn.ELU(-0.4),
    "elu_in_place": lambda: nn.ELU(1.5, inplace=True),
    "relu6": lambda: nn.ReLU6(),
    "relu6_in_place": lambda: nn.ReLU6(inplace=True),
    "selu": lambda: nn.SELU(),
    "selu_in_place": lambda: nn.SELU(inplace=True),
    "hardswish": lambda: nn.Hardswish(),
    "hardswish_in_place": lambda: nn.Hardswish(inplace=True),
    "softplus": lambda: nn.Softplus(),
    "softplus_beta": lambda: nn.Softplus(beta=2),
    "mish": lambda: nn.Mish(),
    "mish_in_place": lambda: nn.Mish(inplace=True),
}


def _changed(module, **settings):
    for name, value in settings.items():
        setattr(module, name, value)
    return module


NEAR_MISSES = {
    "threshold": lambda: nn.Softplus(1, 10),
    "threshold_later": lambda: _changed(nn.Softplus(), threshold=2.0),
    "max_val_later": lambda: _changed(nn.ReLU6(), max_val=1.0),
    "hardtanh": lambda: nn.Hardtanh(0.0, 6.0),
    "no_number": lambda: _changed(nn.ELU(), alpha=torch.tensor([1.0])),
    "celu": lambda: nn.CELU(0.5),
}


@pytest.fixture(autouse=True)
def any_size():
    with thresholds.ignored():
        yield


def _pair(*modules):
    torch.manual_seed(0)
    plain = nn.Sequential(*modules)
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_(0.0, 2.0)
    return fuse(copy.deepcopy(plain)), plain


def _assert_alike(fused, plain, x):
    results = []
    for model in (fused, plain):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, *(p.grad for p in model.parameters())))
        model.zero_grad()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(8), lambda: nn.GroupNorm(4, 8)], ids=["batch", "group"])
def test_after_a_norm(name, norm):
    fused, plain = _pair(nn.Conv2d(3, 8, 3), norm(), MODULES[name]())
    x = torch.randn(4, 3, 9, 9)
    _assert_alike(fused, plain, x)
    assert any("norm" in row.found.lower() and row.becomes not in ("", "modules") for row in explain(fused, x))


@pytest.mark.parametrize("name", MODULES)
def test_folded_in_evaluation(name):
    fused, plain = _pair(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), MODULES[name]())
    fused.eval(), plain.eval()
    with torch.no_grad():
        x = torch.randn(4, 3, 19, 19)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODULES)
def test_after_a_transposed_convolution(name):
    fused, plain = _pair(nn.ConvTranspose2d(8, 3, 4, 2, 1), MODULES[name]())
    _assert_alike(fused, plain, torch.randn(4, 8, 8, 8))


@pytest.mark.parametrize("name", MODULES)
def test_before_a_dropout(name):
    fused, plain = _pair(nn.Linear(8, 64), MODULES[name](), nn.Dropout(0.5))
    x = torch.randn(32, 8)
    y, kept = fused(x), plain[1](plain[0](x))
    torch.testing.assert_close(y, torch.where(y != 0, 2 * kept, 0.0), rtol=1e-5, atol=1e-5)
    assert 0.3 < float((y == 0).float().mean()) < 0.8
    assert "act_dropout" in [row.becomes for row in explain(fused, x)]


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_the_ops_do_not_compute_stays(name):
    fused, plain = _pair(nn.BatchNorm2d(8), NEAR_MISSES[name](), nn.Dropout(0.0))
    x = torch.randn(4, 8, 9, 9)
    if name == "no_number":
        with pytest.raises((TypeError, RuntimeError)):
            plain(x)
        with pytest.raises((TypeError, RuntimeError)):
            fused(x)
        return
    _assert_alike(fused, plain, x)


class _Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm2, self.norm3 = (nn.BatchNorm2d(8) for _ in range(3))


class _Functions(_Base):
    def forward(self, x):
        x = F.elu(self.norm(x), 0.7)
        x = F.relu6(self.norm2(x), inplace=True)
        return F.selu(self.norm3(x))


class _Keywords(_Base):
    def forward(self, x):
        x = F.elu(self.norm(x), alpha=0.7, inplace=True)
        x = F.softplus(self.norm2(x), beta=2)
        return torch.selu(self.norm3(x))


class _Statements(_Base):
    def forward(self, x):
        h = self.norm(x)
        h = F.hardswish(h)
        h = self.norm2(h)
        h = F.mish(h, True)
        h = self.norm3(h)
        return F.softplus(h, 1, 20)


@pytest.mark.parametrize("model", [_Functions, _Keywords, _Statements])
def test_functions_in_a_method(model):
    torch.manual_seed(0)
    plain = model()
    fused = fuse(copy.deepcopy(plain))
    x = torch.randn(4, 8, 9, 9)
    _assert_alike(fused, plain, x)
    assert [row.becomes for row in explain(fused, x)].count("batch_norm_act") == 3


@pytest.mark.parametrize("weights", [1, 8])
def test_a_prelu_after_a_convolution_and_its_norm(weights):
    fused, plain = _pair(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.PReLU(weights))
    x = torch.randn(4, 3, 9, 9)
    _assert_alike(fused, plain, x)
    assert any(row.found == "Conv2d + BatchNorm2d + PReLU" for row in explain(fused, x))
