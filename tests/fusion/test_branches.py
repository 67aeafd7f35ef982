"""A norm at the end of a branch and the activation after it run as one call."""

import copy

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close, assert_gradients_close, calls_of
from torch import nn

from genai_fast import explain, fuse

pytestmark = pytest.mark.usefixtures("small_is_fused")


class Block(nn.Module):
    """As diffusers' residual blocks."""

    def __init__(self, kind="default"):
        super().__init__()
        self.kind = kind
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm2, self.act, self.dropout = nn.GroupNorm(4, 8), nn.SiLU(), nn.Dropout(0.0)

    def forward(self, x, emb=None):
        h = self.conv1(x)
        if self.kind == "default":
            if emb is not None:
                h = h + emb
            h = self.norm2(h)
        elif self.kind == "scale_shift":
            scale, shift = torch.chunk(emb, 2, dim=1)
            h = self.norm2(h)
            h = h * (1 + scale) + shift
        elif self.kind == "early":
            return h
        elif self.kind == "wrong":
            raise ValueError("no such kind")
        h = self.act(h)
        h = self.dropout(h)
        h = self.conv2(h)
        return x + h


class Bare(Block):
    """Without an else, and with a function."""

    def forward(self, x, emb=None):
        h = self.conv1(x)
        if self.kind == "default":
            h = self.norm2(h)
        h = F.silu(h)
        return h if emb is None else h + emb.mean()


class UsedTwice(Block):
    def forward(self, x, emb=None):
        h = self.conv1(x)
        if self.kind == "default":
            h = self.norm2(h)
        return self.act(h) * h


class InALoop(Block):
    def forward(self, x, emb=None):
        for _ in range(3):
            if self.kind == "default":
                x = self.norm2(x)
            else:
                break
            x = self.act(x)
        return x


X, EMB = torch.randn(2, 8, 6, 6), torch.randn(2, 16, 1, 1)


def _step(module, *given):
    y = module(*given)
    y.square().sum().backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return y, gradients


@pytest.mark.parametrize("cls", (Block, Bare, UsedTwice, InALoop), ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("kind", ("default", "scale_shift", "early", "other"))
def test_every_branch_gives_what_it_gave(cls, kind):
    torch.manual_seed(1)
    plain = cls(kind)
    fused = fuse(copy.deepcopy(plain))
    given = (X,) if kind in ("default", "early", "other") else (X, EMB)
    if cls is InALoop and kind != "default":
        assert fused(X) is X
        return
    expected, expected_gradients = _step(plain, *given)
    with calls_of("group_norm_act") as made:
        found, gradients = _step(fused, *given)
    activated = [args[5] for args in made]
    serves = kind == "default" and cls is not UsedTwice
    assert activated.count("silu") == (3 if cls is InALoop else 1) * serves
    assert_close(found, expected)
    assert gradients.keys() == expected_gradients.keys()
    assert_gradients_close(gradients, expected_gradients, 1e-4)


def test_an_error_in_a_branch_stays():
    with pytest.raises(ValueError, match="no such kind"):
        fuse(Block("wrong"))(X)


def test_a_chain_of_several_branches_is_explained_once():
    rows = [(row.path, row.becomes) for row in explain(Block())]
    assert rows.count(("norm2+act", "group_norm_act (SiLU)")) == 1


def test_the_branch_is_chosen_at_every_call():
    fused, plain = fuse(Block()), Block()
    plain.load_state_dict(fused.state_dict())
    for kind in ("default", "other", "early", "default"):
        fused.kind = plain.kind = kind
        assert_close(fused(X), plain(X))
