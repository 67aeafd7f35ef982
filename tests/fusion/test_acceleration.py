"""accelerate: what it does it undoes, what it measures leaves no trace, and what is slower is left out."""

import pytest
import torch
import torch.nn.functional as F
from alike import assert_close
from torch import nn

from genai_fast import accelerate, acceleration, cpu, sdpa


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(acceleration, "_SECONDS", 0.0)


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x):
        y = self.body(x).flatten(2)[:, None]
        return F.scaled_dot_product_attention(y, y, y)


def _ratios(monkeypatch, **given):
    """Measures by a table: what the functions that it is handed do is done."""
    own, asked = acceleration._ratio, []

    def ratio(apply, call):
        _, undo = own(apply, call)
        asked.append(len(undo))
        return next(values), undo

    values = iter([*given.values(), 1.5])
    monkeypatch.setattr(acceleration, "_ratio", ratio)
    return asked


def test_all_of_it_and_nothing_left_after_remove(monkeypatch):
    model, x = _Net(), torch.randn(2, 3, 8, 8)
    expected, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    strides = [p.stride() for p in model.parameters()]
    model.body[1].reset_running_stats()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    _ratios(monkeypatch, fuse=1.2, enable_sdpa=1.1, tune_cpu=1.3, channels_last=1.1)
    done = accelerate(model, x)
    assert [p.name for p in done.parts if p.kept] == ["fuse", "enable_sdpa", "tune_cpu", "channels_last"]
    assert done.ratio == 1.5 and "together" in str(done) and "1.20 x" in str(done)
    assert type(model.body) is not nn.Sequential and cpu.active() and sdpa.active()
    assert model.body[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert_close(model(x), expected, 1e-5)
    done.remove()
    done.remove()
    assert type(model.body) is nn.Sequential and not cpu.active() and not sdpa.active()
    assert [p.stride() for p in model.parameters()] == strides
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if "running" not in k)


def test_what_is_slower_is_left_out(monkeypatch):
    model, x = _Net(), torch.randn(2, 3, 8, 8)
    _ratios(monkeypatch, fuse=0.9, enable_sdpa=0.8, tune_cpu=1.2, channels_last=0.7)
    with accelerate(model, (x,)) as done:
        assert [p.name for p in done.parts if p.kept] == ["tune_cpu"]
        assert type(model.body) is nn.Sequential and not sdpa.active() and cpu.active()
        assert model.body[0].weight.is_contiguous()
    assert not cpu.active()


def test_it_measures(monkeypatch):
    done = accelerate(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.randn(3, 4))
    ratios = [p.ratio for p in done.parts if p.ratio is not None]
    assert ratios and all(r > 0 for r in ratios)
    (attention,) = (p for p in done.parts if p.name == "enable_sdpa")
    assert not attention.kept and "does not call" in attention.reason
    done.remove()


def test_without_an_example_nothing_is_run():
    model = _Net()
    model.forward = None
    done = accelerate(model)
    assert {p.name: p.ratio for p in done.parts} == {"fuse": None, "enable_sdpa": None, "tune_cpu": None}
    assert done.ratio is None and type(model.body) is not nn.Sequential
    done.remove()


def test_a_model_that_raises_is_as_it_was():
    model = _Net()
    with pytest.raises(RuntimeError, match="channels"):
        accelerate(model, torch.randn(2, 5, 8, 8))
    assert type(model.body) is nn.Sequential and not cpu.active() and not sdpa.active()
    with pytest.raises(TypeError, match=r"fuse: model: expected an nn.Module"):
        accelerate("model")


def test_what_was_on_before_stays_on():
    with cpu.tune_cpu(matmul=False):
        accelerate(_Net()).remove()
        assert cpu.active()
