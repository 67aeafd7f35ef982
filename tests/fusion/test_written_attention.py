"""Attention written out in methods: one call where it is softmax(scale q k^T) v, and the statements where it is not."""

import math

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close
from torch import nn

from genai_fast import explain, fuse, ops

pytestmark = pytest.mark.usefixtures("small_is_fused")
B, H, T, D = 2, 3, 17, 8


class _Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.scale, self.head_dim = nn.Dropout(0.0), D**-0.5, D
        self.register_buffer("mask", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))
        self.register_buffer("later", torch.triu(torch.ones(32, 32, dtype=torch.bool), diagonal=1))


class _MinGPT(_Base):
    def forward(self, q, k, v):
        T = q.size(2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        att = self.drop(att)
        y = att @ v
        return y


class _Scores(_Base):
    def forward(self, q, k, v):
        n = q.shape[-2]
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(self.later[:n, :n], -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        return torch.matmul(self.drop(weights), v)


class _OneLine(_Base):
    def forward(self, q, k, v):
        return F.softmax(q @ k.mT * self.scale, -1) @ v


class _Full(_Base):
    def forward(self, q, k, v):
        attn = self.scale * torch.matmul(q, k.permute(0, 1, 3, 2))
        attn = attn.softmax(dim=-1)
        out = attn.matmul(v)
        return out


class _Unscaled(_Base):
    def forward(self, q, k, v):
        T = q.size(2)
        w = q @ k.transpose(-1, -2)
        w = w.masked_fill(~(self.mask[0, 0, :T, :T] > 0), -1e9)
        w = w.softmax(-1)
        return w @ v


class _Power(_Base):
    def forward(self, q, k, v):
        dots = q @ k.transpose(-1, -2) / (q.shape[-1] ** 0.5)
        attend = F.softmax(dots, dim=3)
        z = attend @ v
        return z


SERVED = {_MinGPT: True, _Scores: True, _OneLine: False, _Full: False, _Unscaled: True, _Power: False}


class _Kept(_Base):
    def forward(self, q, k, v):
        att = F.softmax(q @ k.mT * self.scale, -1)
        self.seen = att
        return att @ v


class _Returned(_Base):
    def forward(self, q, k, v):
        att = F.softmax(q @ k.mT * self.scale, -1)
        y = att @ v
        return y, att


class _OverRows(_Base):
    def forward(self, q, k, v):
        return F.softmax(q @ k.mT * self.scale, dim=-2) @ v


class _Gated(_Base):
    def forward(self, q, k, v):
        return torch.sigmoid(q @ k.mT * self.scale) @ v


class _Biased(_Base):
    def forward(self, q, k, v):
        return F.softmax(q @ k.mT * self.scale + self.mask[:, :, : q.size(2), : q.size(2)], -1) @ v


class _Soft(_Base):
    def forward(self, q, k, v):
        att = (q @ k.mT).masked_fill(self.mask[:, :, : q.size(2), : q.size(2)] == 0, -5.0)
        return F.softmax(att, -1) @ v


LEFT = (_Kept, _Returned, _OverRows, _Gated, _Biased, _Soft)


def _heads(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape or (B, H, T, D), dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.fixture
def calls(monkeypatch):
    """Whether each call of ops.causal_attention is causal."""
    made, own = [], ops.causal_attention

    def called(*args, **settings):
        made.append(settings["causal"])
        return own(*args, **settings)

    monkeypatch.setattr(ops, "causal_attention", called)
    return made


def _alike(model, plain, given):
    (got, expected), results = (model(*given), plain(*given)), []
    for y in (got, expected):
        results.append(torch.autograd.grad(y.square().sum(), given))
    assert got.shape == expected.shape and got.stride() == expected.stride() and got.dtype is expected.dtype
    assert_close(got, expected.detach(), 1e-5)
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("cls", SERVED, ids=lambda cls: cls.__name__)
def test_a_spelling_is_one_call(cls, calls):
    model = fuse(cls())
    assert any(row.becomes == "causal_attention" for row in explain(model))
    _alike(model, cls(), _heads())
    assert calls == [SERVED[cls]]


@pytest.mark.parametrize("cls", LEFT, ids=lambda cls: cls.__name__)
def test_something_else_is_left_alone(cls):
    model = cls()
    assert not any(row.becomes == "causal_attention" for row in explain(model))
    first, second = ((y[0] if isinstance(y, tuple) else y) for y in (cls()(*_heads()), fuse(model)(*_heads())))
    assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore::genai_fast.FallbackWarning")
def test_what_is_not_causal_runs_as_it_is_written(calls):
    plain, model = _MinGPT(), fuse(_MinGPT())
    for module in (plain, model):
        module.mask[..., 5] = 1.0  # everybody sees it
    _alike(model, plain, _heads())
    _alike(model, plain, _heads(B, H, T, D, dtype=torch.float64))
    assert not calls
    model.mask, plain.mask = (torch.tril(torch.ones(1, 1, 32, 32)) for _ in range(2))
    _alike(model, plain, _heads())
    assert calls == [True]


def test_dropout_draws_pytorchs_numbers_only_if_it_must(calls):
    given = _heads()
    made, exact = fuse(_MinGPT()), fuse(_MinGPT(), random=False)
    made.drop.p = exact.drop.p = 0.5
    plain = _MinGPT()
    plain.drop.p = 0.5
    torch.manual_seed(3)
    expected = plain(*given)
    torch.manual_seed(3)
    assert torch.equal(exact(*given), expected) and not calls
    made(*given)
    assert calls == [True]
    assert_close(made.eval()(*given), plain.eval()(*given), 1e-5)


def test_hooks_and_replaced_functions_are_honoured(calls, monkeypatch):
    model, given = fuse(_MinGPT()), _heads()
    seen = []
    model.drop.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(*given)
    assert seen == [(B, H, T, T)] and not calls
    model = fuse(_OneLine())
    monkeypatch.setattr(F, "softmax", lambda x, dim: torch.zeros_like(x))
    assert not model(*given).any() and not calls


def test_a_compiled_model_runs_it_as_it_is_written():
    given = _heads()
    model = torch.compile(fuse(_MinGPT()), backend="eager", fullgraph=True)
    assert_close(model(*given), _MinGPT()(*given), 1e-6)
