"""An activation times another tensor runs as one call in methods, and nothing else does."""

import copy

import product_models as classes
import pytest
import torch
import torch.nn.functional as F
from alike import assert_close, calls_of
from torch import nn

from genai_fast import explain, fuse, unfuse
from genai_fast.fusion import thresholds

named = pytest.mark.parametrize("cls", classes.SPELLINGS, ids=lambda cls: cls.__name__)


def _pair(cls, dtype=torch.float32):
    torch.manual_seed(2)
    plain = cls(64).to(dtype)
    return plain, fuse(copy.deepcopy(plain)), torch.randn(32, 64, 64).to(dtype)


def _step(module, x):
    x = x.detach().requires_grad_()
    y = module(x)
    y.float().square().sum().backward()
    gradients = (x.grad, *(p.grad for p in module.parameters()))
    return y, *(g for g in gradients if g is not None)


@named
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_results_and_gradients_are_those_of_the_class(cls, dtype):
    plain, fused, x = _pair(cls, dtype)
    expected = _step(plain, x)
    with calls_of("gated_act") as made, thresholds.ignored():
        found = _step(fused, x)
    assert len(made) == 1
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 2e-5 if dtype is torch.float32 else 4e-2)


@named
def test_it_is_explained_and_taken_back(cls):
    plain, fused, _ = _pair(cls)
    assert "gated_act" in [row.becomes.split(" ")[0] for row in explain(plain)]
    assert type(fused) is not cls and isinstance(fused, cls)
    assert type(unfuse(fused)) is cls


@pytest.mark.parametrize("cls", classes.NEAR_MISSES, ids=lambda cls: cls.__name__)
def test_a_near_miss_is_left_alone(cls):
    plain, fused, x = _pair(cls)
    expected = _step(plain, x)
    with calls_of("gated_act") as made:
        found = _step(fused, x)
    assert not made
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_children_are_called_in_their_order_with_their_hooks():
    plain, fused, x = _pair(classes.Llama)
    order = {}
    for module in (plain, fused):
        seen = order[module] = []
        for name, child in module.named_children():
            child.register_forward_hook(lambda child, given, y, name=name, seen=seen: seen.append(name))
        expected = module(x)
    assert order[plain] == order[fused] == ["gate_proj", "act_fn", "up_proj", "down_proj"]
    fused.act_fn.register_forward_hook(lambda child, given, y: 2 * y)
    assert_close(fused(x), 2 * expected)


def test_an_activation_replaced_later_is_called(monkeypatch):
    for cls in (classes.Llama, classes.OwnActivation):
        _, fused, x = _pair(cls)
        fused.act_fn = nn.Tanh()
        assert_close(fused(x), fused.down_proj(torch.tanh(fused.gate_proj(x)) * fused.up_proj(x)))
    _, fused, x = _pair(classes.OwnActivation)
    fused.act_fn.act = torch.sigmoid
    assert_close(fused(x), fused.down_proj(torch.sigmoid(fused.gate_proj(x)) * fused.up_proj(x)))
    _, fused, x = _pair(classes.Functional)
    monkeypatch.setattr(F, "silu", torch.tanh)
    assert_close(fused(x), fused.down_proj(torch.tanh(fused.gate_proj(x)) * fused.up_proj(x)))


def test_a_linear_replaced_later_is_called():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.more = base, nn.Parameter(torch.full((128,), 0.5))

        def forward(self, x):
            return self.base(x) + self.more

    plain, fused, x = _pair(classes.Llama)
    for module in (plain, fused):
        module.gate_proj, module.up_proj = Adapter(module.gate_proj), Adapter(module.up_proj)
    with calls_of("gated_act") as made:
        found = _step(fused, x)
    assert made
    for a, b in zip(found, _step(plain, x), strict=True):
        assert_close(a, b)


def test_factors_of_other_shapes_and_dtypes():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.SiLU()

        def forward(self, gate, up):
            return self.act(gate) * up

    module, gate = Broadcast(), torch.randn(16, 64, 64)
    for up in (torch.randn(64), torch.randn(16, 64, 64).double(), 2.0, torch.randn(64, 64, 16).transpose(0, 2)):
        expected = module(gate, up)
        found = fuse(copy.deepcopy(module))(gate, up)
        assert torch.equal(found, expected) and found.stride() == expected.stride()
    with pytest.raises(RuntimeError, match="must match"):
        fuse(module)(gate, torch.randn(3, 64))


def test_under_autocast():
    plain, fused, x = _pair(classes.Llama)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = plain(x), fused(x)
    assert_close(found, expected, 2e-2)


@named
def test_compiled(cls):
    plain, fused, x = _pair(cls)
    assert_close(torch.compile(fused, fullgraph=True, backend="eager")(x), plain(x))
