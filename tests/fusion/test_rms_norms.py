"""RMS norms of people's own classes run as one call, and nothing else does."""

import copy
import pickle

import pytest
import rms_norm_models as classes
import torch
from alike import assert_close, calls_of
from torch import nn

import genai_fast
from genai_fast import explain, fuse, unfuse
from genai_fast.fusion import thresholds

named = pytest.mark.parametrize("cls", classes.SPELLINGS, ids=lambda cls: cls.__name__)


def _norm(cls, dtype=torch.float32, columns=64, **settings):
    norm = cls(columns, **settings)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.2 * torch.randn(columns, generator=torch.Generator().manual_seed(3)))
    return norm.to(dtype)


def _step(norm, x):
    x = x.detach().requires_grad_()
    y = norm(x)
    (y.float() * torch.linspace(-1, 1, y.size(-1))).sum().backward()
    gradients = [p.grad for p in norm.parameters()]
    norm.zero_grad()
    return y, x.grad, *gradients


def _tolerance(dtype):
    return 2e-5 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps


@named
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_results_and_gradients_are_those_of_the_class(cls, dtype):
    norm, x = _norm(cls, dtype), torch.randn(16, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = _step(norm, x)
    fuse(norm)
    with calls_of("rms_norm") as made:
        found = _step(norm, x)
    assert bool(made) is (dtype is torch.float32 or cls is not classes.Plain)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, _tolerance(dtype))


@named
def test_it_is_explained_and_taken_back(cls):
    norm = _norm(cls)
    before = type(norm)
    (row,) = explain(norm)
    assert row.becomes == "rms_norm"
    fuse(norm)
    assert type(norm) is not before and isinstance(norm, before)
    assert type(pickle.loads(pickle.dumps(norm))) is before and type(copy.deepcopy(norm)) is type(norm)
    assert type(unfuse(norm)) is before


@pytest.mark.parametrize("cls", classes.NEAR_MISSES, ids=lambda cls: cls.__name__)
def test_a_near_miss_is_left_alone(cls):
    norm = _norm(cls)
    assert all(not row.becomes for row in explain(norm))
    fuse(norm)
    assert type(norm) is cls


@named
def test_the_input_may_be_changed_in_place_where_the_class_allows_it(cls):
    """The classes that cast keep float32 copies of a narrow input."""
    x = torch.randn(16, 64, 64, dtype=torch.bfloat16)
    gradients = []
    for norm in (_norm(cls, torch.bfloat16), fuse(_norm(cls, torch.bfloat16))):
        leaf = x.clone().requires_grad_()
        h = leaf * 1.0
        y = norm(h)
        if cls is not classes.Plain:
            h.add_(y.detach())
        (y.float() * torch.linspace(-1, 1, 64)).sum().backward()
        gradients.append(leaf.grad)
    assert_close(*gradients, 2e-2)


@named
def test_a_transposed_input_has_a_transposed_result(cls):
    norm, x = _norm(cls), torch.randn(8, 16, 8, 64).transpose(1, 2)
    expected = norm(x)
    with calls_of("rms_norm") as made:
        found = fuse(norm)(x)
    assert made and found.stride() == expected.stride()
    assert_close(found, expected)


def test_the_dtype_is_that_of_the_class():
    """Llama's own result is float32 where its weight is; Gemma's is as its input."""
    x = torch.randn(16, 64, 64, dtype=torch.bfloat16)
    for cls, dtype in ((classes.Llama, torch.float32), (classes.Gemma, torch.bfloat16)):
        norm = _norm(cls)
        expected = norm(x)
        assert expected.dtype is dtype
        assert_close(fuse(norm)(x), expected, 1e-2)


@named
def test_under_autocast(cls):
    norm, x = _norm(cls), torch.randn(16, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = norm(x)
        assert_close(fuse(norm)(x), expected)


def test_a_class_with_float64_has_its_statistics_in_float32():
    norm, x = _norm(classes.Llama, torch.float64), 1e-30 * torch.randn(64, 64, dtype=torch.float64)
    expected = norm(x)
    with calls_of("rms_norm") as made:
        assert torch.equal(fuse(norm)(x), expected)
    assert not made


def test_hooks_run_and_may_change_the_result():
    norm, x = fuse(_norm(classes.Llama)), torch.randn(16, 64, 64)
    expected = norm(x)
    norm.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    norm.register_forward_hook(lambda module, given, y: -y)
    assert_close(norm(x), -expected)


def test_by_keyword_and_a_missing_argument():
    norm, x = _norm(classes.Llama), torch.randn(16, 64, 64)
    expected = norm(x)
    fuse(norm)
    assert_close(norm(hidden_states=x), expected)
    with pytest.raises(TypeError, match="hidden_states"):
        norm()
    with pytest.raises(TypeError, match="positional argument"):
        norm(x, x)


def test_what_is_replaced_later_is_called(monkeypatch):
    norm, x = fuse(_norm(classes.Meta)), torch.randn(16, 64, 64)
    with monkeypatch.context() as patch:
        patch.setattr(classes.Meta, "_norm", lambda self, h: h)
        assert torch.equal(norm(x), x * norm.weight)
    with monkeypatch.context() as patch:
        patch.setattr(classes.Meta, "forward", lambda self, h: h)
        assert norm(x) is x
    norm._norm = lambda h: h
    assert torch.equal(norm(x), x * norm.weight)
    norm = fuse(_norm(classes.ByFunction))
    monkeypatch.setattr(classes, "normalized", lambda h, eps: h)
    assert torch.equal(norm(x), x * norm.weight)


def test_settings_changed_later():
    norm, x = fuse(_norm(classes.Llama)), torch.randn(16, 64, 64)
    norm.variance_epsilon = 1.0
    assert_close(norm(x), norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1.0))
    norm.variance_epsilon = torch.tensor(1.0)
    assert_close(norm(x), norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1.0))
    norm.weight = nn.Parameter(torch.ones(1))
    assert_close(norm(x), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1.0))


def test_small_inputs_stay_with_the_class():
    norm = fuse(_norm(classes.Llama))
    with calls_of("rms_norm") as made:
        norm(torch.randn(2, 64))
        assert not made
        with thresholds.ignored():
            norm(torch.randn(2, 64))
        assert made


def test_second_derivatives():
    norm = _norm(classes.Gemma)
    x = torch.randn(16, 64, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    results = []
    for module in (norm, genai_fast.fuse(copy.deepcopy(norm))):
        (g,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), x)[0])
    assert_close(results[1], results[0], 1e-4)


def test_compiled():
    norm, x = _norm(classes.Llama), torch.randn(16, 64, 64)
    expected = norm(x)
    assert_close(torch.compile(fuse(norm), fullgraph=True, backend="aot_eager")(x), expected)
