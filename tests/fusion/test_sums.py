"""A residual sum and its RMS norm in a method run as one call, and nothing else does."""

import copy

import pytest
import rms_norm_models as norms
import torch
from alike import assert_close, calls_of
from torch import nn

from genai_fast import explain, fuse, unfuse


class _Block(nn.Module):
    def __init__(self, norm=norms.Llama):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm = norm(64)


class Llama(_Block):
    def forward(self, hidden_states):
        residual = hidden_states
        hidden_states = self.first(hidden_states)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.norm(hidden_states)
        hidden_states = self.second(hidden_states)
        return residual + hidden_states


class TwoStatements(_Block):
    def forward(self, x):
        h = x + self.first(x)
        y = self.norm(h)
        return h + self.second(y)


class Branch(_Block):
    def forward(self, x):
        if x.dim() == 3:
            x = self.first(x) + x
            y = self.norm(x)
            return self.second(y) * x
        return x


SPELLINGS = (Llama, TwoStatements, Branch)


class Difference(_Block):
    def forward(self, x):
        h = x - self.first(x)
        return h + self.norm(h)


class Between(_Block):
    """What comes between sees the sum, and may change it."""

    def forward(self, x):
        h = x + self.first(x)
        h = h.mul(2.0)
        return self.norm(h)


class OtherInput(_Block):
    def forward(self, x):
        h = x + self.first(x)
        y = self.norm(x)
        return h + y


class Caught(_Block):
    def forward(self, x):
        try:
            h = x + self.first(x)
            h = self.norm(h)
        except ValueError:
            pass
        return h


NEAR_MISSES = (Difference, Between, OtherInput, Caught)
X = torch.randn(16, 64, 64, generator=torch.Generator().manual_seed(1))


def _pair(cls, dtype=torch.float32, **settings):
    torch.manual_seed(2)
    plain = cls(**settings).to(dtype)
    return plain, fuse(copy.deepcopy(plain))


def _step(module, x):
    x = x.detach().requires_grad_()
    y = module(x)
    (y.float() * torch.linspace(-1, 1, 64)).sum().backward()
    found = y, x.grad, *(p.grad for p in module.parameters())
    module.zero_grad()
    return [t for t in found if t is not None]


def _with_residual(made):
    return sum(named.get("residual") is not None for named in made)


@pytest.mark.parametrize("cls", SPELLINGS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("norm", (norms.Llama, norms.Gemma, norms.Plain), ids=lambda cls: cls.__name__)
def test_results_and_gradients_are_those_of_the_class(cls, norm):
    plain, fused = _pair(cls, norm=norm)
    expected = _step(plain, X)
    with calls_of("rms_norm", named=True) as made:
        found = _step(fused, X)
    assert _with_residual(made) == len(made) == 1
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("cls", NEAR_MISSES, ids=lambda cls: cls.__name__)
def test_a_near_miss_is_left_alone(cls):
    plain, fused = _pair(cls)
    expected = _step(plain, X)
    with calls_of("rms_norm", named=True) as made:
        found = _step(fused, X)
    assert not _with_residual(made)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_it_is_explained_and_taken_back():
    plain, fused = _pair(Llama)
    assert "rms_norm with its sum" in [row.becomes for row in explain(plain)]
    assert [*explain(plain)] == [*explain(fused)]
    assert type(unfuse(fused)) is Llama and type(fused.norm) is norms.Llama


def test_hooks_of_the_norm_and_another_norm():
    plain, fused = _pair(Llama)
    for module in (plain, fused):
        module.norm.register_forward_hook(lambda norm, given, y: y + given[0])
    for a, b in zip(_step(fused, X), _step(plain, X), strict=True):
        assert_close(a, b)
    for module in (plain, fused):
        module.norm = nn.LayerNorm(64)
    assert_close(fused(X), plain(X))
    fused.norm = plain.norm = nn.Identity()
    assert_close(fused(X), plain(X))


def test_a_narrow_sum_may_be_changed_in_place():
    """As the class allows, whose norm keeps a float32 copy."""

    class Changing(_Block):
        def forward(self, x):
            h = x + self.first(x)
            y = self.norm(h)
            h += self.second(y)
            return h

    plain, fused = _pair(Changing, torch.bfloat16)
    for a, b in zip(_step(fused, X.bfloat16()), _step(plain, X.bfloat16()), strict=True):
        assert_close(a, b, 3e-2)
    with torch.no_grad(), calls_of("rms_norm", named=True) as made:
        found = fused(X.bfloat16())
    assert _with_residual(made) == 1
    assert_close(found, plain(X.bfloat16()), 3e-2)


def test_sums_that_broadcast_or_lie_otherwise():
    plain, fused = _pair(TwoStatements)
    with calls_of("rms_norm", named=True) as made:
        found = fused(X.transpose(0, 1))
    assert not _with_residual(made)
    expected = plain(X.transpose(0, 1))
    assert found.stride() == expected.stride()
    assert_close(found, expected)
