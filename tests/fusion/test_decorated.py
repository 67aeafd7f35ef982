"""Decorated methods keep their decorators, and what these know."""

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close, norm_calls
from torch import nn

from genai_fast import fuse, unfuse

pytestmark = pytest.mark.usefixtures("small_is_fused")


def counted(times):
    """A decorator with arguments and a count of its own."""

    def decorate(function):
        calls = 0

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            wrapper.last = calls
            return times * function(*args, **kwargs)

        return wrapper

    return decorate


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    @counted(2.0)
    @torch.no_grad()
    @counted(3.0)
    def forward(self, x, slope=0.1):
        return F.leaky_relu(self.bn(x), 0.1) * slope


def test_decorators_stay_around_the_method():
    torch.manual_seed(0)
    plain, fused, x = Decorated(), fuse(Decorated()), torch.randn(2, 3, 4, 4)
    assert type(fused) is not Decorated
    with norm_calls() as made:
        found = fused(x, slope=2.0)
    assert made == ["leaky_relu"] and not found.requires_grad
    assert_close(found, plain(x, slope=2.0))
    assert inspect.signature(type(fused).forward) == inspect.signature(Decorated.forward)
    assert type(unfuse(fused)) is Decorated


def test_a_decorator_knows_of_both():
    """Its variables are the same ones, as of one method."""
    x = torch.randn(2, 3, 4, 4)
    Decorated()(x)
    before = Decorated.forward.last
    fused = fuse(Decorated())
    fused(x)
    Decorated()(x)
    assert Decorated.forward.last == before + 2


def test_a_decorated_method_replaced_later(monkeypatch):
    fused, x = fuse(Decorated()), torch.randn(2, 3, 4, 4)
    monkeypatch.setattr(Decorated, "forward", lambda self, x: x)
    assert fused(x) is x
