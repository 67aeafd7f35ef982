"""Functions that turn queries and keys run as one kernel a tensor, and nothing else does."""

import copy
import functools

import pytest
import rotary_models as models
import torch
from alike import assert_close, calls_of

from genai_fast import explain, fuse, unfuse
from genai_fast.fusion import rotary_calls
from genai_fast.fusion.rotary_calls import rotary_of

pytestmark = pytest.mark.usefixtures("small_is_fused")
named = pytest.mark.parametrize("function", models.SPELLINGS, ids=lambda f: f.__name__)


def _tables(batch=1, columns=16, dtype=torch.float32, tokens=9):
    """The two columns of a pair are not alike, as where channels turn by several axes."""
    angles = torch.randn(batch, tokens, columns, generator=torch.Generator().manual_seed(1))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _step(model, x, *tables):
    x = x.detach().requires_grad_()
    results = model(x, *tables)
    sum((y.float() * torch.linspace(-1, 1, y.size(-1))).square().sum() for y in results).backward()
    gradients = [x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return *results, *gradients


@named
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("heads_inside", (False, True))
def test_results_gradients_and_layouts_are_those_of_the_function(function, dtype, batch, heads_inside):
    tables = _tables(batch, 12 if function is models.partial else 16, dtype)
    results = []
    for run in (functools.partial(rotary_calls.call, function), function):
        torch.manual_seed(4)
        q, k = (torch.randn(2, h, 9, 16, dtype=dtype) for h in (4, 2))
        if heads_inside:
            q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        given = (q.requires_grad_(),) if function is models.one else (q.requires_grad_(), k.requires_grad_())
        with calls_of("rotary") as made:
            found = run(*given, *tables)
        assert len(made) == (0 if run is function else len(given))
        found = (found,) if function is models.one else found
        sum((y.float() * torch.linspace(-1, 1, 16)).square().sum() for y in found).backward()
        results.append((*found, *(x.grad for x in given)))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 2e-5 if dtype is torch.float32 else 2e-2)
    assert [y.stride() for y in results[0][: len(found)]] == [y.stride() for y in results[1][: len(found)]]


def test_a_method_that_calls_one():
    plain, x = models.Attention(), torch.randn(2, 9, 64)
    fused = fuse(copy.deepcopy(plain))
    expected = _step(plain, x, *_tables())
    with calls_of("rotary") as made:
        found = _step(fused, x, *_tables())
    assert len(made) == 2
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    assert [y.stride() for y in found[:2]] == [y.stride() for y in expected[:2]]


@named
def test_functions_are_known_by_what_they_compute(function):
    rotary = rotary_of(function)
    assert rotary.pair is (function is not models.one) and rotary.partial is (function is models.partial)
    assert [function.__code__.co_varnames[k] for k in (rotary.cos, rotary.sin)] == ["cos", "sin"]


@pytest.mark.parametrize("function", models.NEAR_MISSES, ids=lambda f: f.__name__)
def test_a_near_miss_is_left_alone(function, monkeypatch):
    assert rotary_of(function) is None
    monkeypatch.setattr(models, "turn", function)
    model = models.Attention()
    assert type(fuse(model)) is models.Attention


def test_it_is_explained_and_taken_back():
    model = models.Attention()
    assert next((row.found, row.becomes) for row in explain(model)) == ("apply_rotary_pos_emb(q, k, ...)", "rotary")
    assert type(fuse(model)) is not models.Attention
    assert type(unfuse(model)) is models.Attention


def test_what_is_replaced_later_is_called(monkeypatch):
    model, x, tables = fuse(models.Attention()), torch.randn(2, 9, 64), _tables()
    with monkeypatch.context() as patch:
        patch.setattr(models, "rotate_half", lambda x: x)
        q, _ = model(x, *tables)
        expected = model.q_proj(x).view(2, 9, 4, 16).transpose(1, 2) * (tables[0] + tables[1]).unsqueeze(1)
        assert_close(q, expected)
    monkeypatch.setattr(models, "turn", lambda q, k, cos, sin: (cos, sin))
    assert model(x, *tables) == tables


def test_what_the_kernel_does_not_take():
    """Tables that need gradients, of another dtype, of a batch that broadcasts: the function itself serves."""
    plain = models.Attention()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 9, 64)
    cos, sin = _tables()
    for tables in ((cos.clone().requires_grad_(), sin), (cos.double(), sin.double()), (cos[:, :1], sin[:, :1])):
        expected = plain(x, *tables)
        with calls_of("rotary") as made:
            found = fused(x, *tables)
        assert not made
        for a, b in zip(found, expected, strict=True):
            assert a.dtype is b.dtype and torch.equal(a, b)
    with pytest.raises(RuntimeError, match="size"):
        fused(x, cos[..., :6], sin[..., :6])


def test_compiled():
    plain = models.Attention()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 9, 64)
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    for a, b in zip(compiled(x, *_tables()), plain(x, *_tables()), strict=True):
        assert_close(a, b)
