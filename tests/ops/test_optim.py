"""genai_fast.optim: the numbers, the state and the hooks of torch.optim."""

import copy

import numpy as np
import pytest
import torch

from genai_fast import FallbackWarning
from genai_fast.optim import Adam, AdamW


def _params(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (5,), (), (3, 2, 2))]


def _train(optimizer, params, steps, skip=None):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for k, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = None if (step, k) == skip else gradient
        optimizer.step()


def _assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::genai_fast.FallbackWarning")
@pytest.mark.parametrize(
    ("mine", "torchs", "settings"),
    [
        (Adam, torch.optim.Adam, {}),
        (Adam, torch.optim.Adam, dict(lr=0.01, betas=(0.5, 0.9), eps=1e-5, weight_decay=0.1)),
        (AdamW, torch.optim.AdamW, dict(weight_decay=0.1)),
        (Adam, torch.optim.Adam, dict(amsgrad=True)),
        (Adam, torch.optim.Adam, dict(maximize=True)),
        (Adam, torch.optim.Adam, dict(lr=torch.tensor(0.01))),
    ],
)
def test_same_numbers_as_torch(mine, torchs, settings):
    ours, theirs = _params(), _params()
    _train(mine(ours, **settings), ours, 20)
    _train(torchs(theirs, **settings), theirs, 20)
    _assert_same(ours, theirs)


def test_parameters_that_miss_a_step_keep_their_own_count():
    ours, theirs = _params(), _params()
    mine, torchs = Adam(ours), torch.optim.Adam(theirs)
    _train(mine, ours, 6, skip=(2, 1))
    _train(torchs, theirs, 6, skip=(2, 1))
    assert [mine.state[p]["step"].item() for p in ours] == [6.0, 5.0, 6.0, 6.0]
    _assert_same(ours, theirs)


def test_state_goes_both_ways():
    ours, theirs = _params(), _params()
    mine, torchs = Adam(ours), torch.optim.Adam(theirs)
    _train(mine, ours, 5)
    for a, b in zip(theirs, ours, strict=True):
        a.data.copy_(b.data)
    torchs.load_state_dict(copy.deepcopy(mine.state_dict()))
    _train(torchs, theirs, 5)
    back = Adam(ours)
    back.load_state_dict(copy.deepcopy(mine.state_dict()))
    _train(back, ours, 5)
    _assert_same(ours, theirs)


@pytest.mark.filterwarnings("ignore::genai_fast.FallbackWarning")
def test_hooks_run_once_whoever_steps():
    calls = []
    torch.optim.Adam(_params())  # torch wraps the inherited step, too
    for transpose in (False, True):
        p = torch.nn.Parameter(torch.randn(4, 3).t() if transpose else torch.randn(3, 4))
        optimizer = Adam([p])
        optimizer.register_step_post_hook(lambda *a: calls.append(1))
        p.grad = torch.ones_like(p)
        before = p.detach().clone()
        optimizer.step()
        assert not torch.equal(p, before)
    assert len(calls) == 2


def test_closure_is_evaluated_once_with_gradients():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer, calls = Adam([p]), []

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        calls.append(1)
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert len(calls) == 1
    assert p.max() < 1.0


def test_moments_too_small_for_a_normal_float_are_flushed():
    """They would slow every later step down a hundredfold on many processors."""
    p = torch.nn.Parameter(torch.ones(64))
    optimizer = Adam([p])
    p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    state = optimizer.state[p]
    state["exp_avg"].fill_(1e-39)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    if state["exp_avg"].any() and not torch.set_flush_denormal(False):
        pytest.skip("this processor has no flush mode that the kernel knows")
    assert not state["exp_avg"].any()
    assert torch.tensor(1e-39) * 0.5 > 0  # the mode ended with the call


def test_a_step_that_is_torchs_says_so_once():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([p], amsgrad=True)
    p.grad = torch.ones(3)
    with pytest.warns(FallbackWarning, match="Adam steps as torch's own: amsgrad=True") as said:
        optimizer.step()
        optimizer.step()
    assert len(said) == 1


def test_channels_last_parameters_stay_with_the_kernel():
    """FallbackWarning is an error in tests."""
    ours, theirs = (torch.nn.Parameter(torch.arange(24.0).view(2, 3, 2, 2)) for _ in range(2))
    ours.data = ours.data.to(memory_format=torch.channels_last)
    for p, optimizer in ((ours, Adam([ours])), (theirs, torch.optim.Adam([theirs]))):
        for scale in (1.0, -3.0):
            p.grad = scale * torch.arange(24.0).view(2, 3, 2, 2)  # row-major, unlike ours
            optimizer.step()
    _assert_same([ours], [theirs])


def test_autograd_sees_the_update():
    p, x = torch.nn.Parameter(torch.randn(5)), torch.randn(5, requires_grad=True)
    y = (p * p * x).sum()
    p.grad = torch.ones(5)
    Adam([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.filterwarnings("ignore::genai_fast.FallbackWarning")
def test_grad_scaler_skips_infinite_gradients():
    for fused in (None, True):
        p = torch.nn.Parameter(torch.ones(4))
        optimizer, scaler = Adam([p], lr=0.01, fused=fused), torch.amp.GradScaler("cpu", init_scale=2.0**16)
        scaler.scale(p.sum())
        p.grad = torch.tensor([1.0, 2.0, float("inf"), 1.0])
        scaler.step(optimizer)
        assert torch.equal(p, torch.ones(4))


def test_numpy_rates():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = Adam([p])
    optimizer.param_groups[0]["lr"] = np.float64(0.01)
    p.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.99))


def test_a_loaded_state_takes_the_layout_of_its_parameter(recwarn):
    """Checkpoints hold contiguous tensors."""
    torch.manual_seed(0)
    results = []
    for reload in (False, True):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = Adam(conv.parameters())
        for _ in range(2):
            conv(torch.ones(1, 3, 5, 5)).square().sum().backward()
            optimizer.step()
            if reload:
                state = optimizer.state_dict()
                for values in state["state"].values():
                    values.update({k: v.contiguous() for k, v in values.items()})
                optimizer = Adam(conv.parameters())
                optimizer.load_state_dict(state)
        results.append(conv.weight.detach())
    assert torch.equal(*results) and not [w for w in recwarn if issubclass(w.category, FallbackWarning)]
