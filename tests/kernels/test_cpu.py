"""tune_cpu: other libraries below autograd, the same numbers, and everything back afterwards."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import genai_fast
from genai_fast import autotune, cpu

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def onednn_is_faster(monkeypatch):
    """As it would be on a machine where that is so; counts what it computes."""
    forms, compute = [], cpu._onednn

    def counted(bias, a, b):
        forms.append(cpu._form(a, b))
        return compute(bias, a, b)

    monkeypatch.setattr(cpu, "_onednn", counted)
    monkeypatch.setattr(autotune, "choose", lambda *arguments: autotune.Choice("onednn", {}))
    return forms


def layer(rows=400):
    torch.manual_seed(0)
    return nn.Linear(128, 192), torch.randn(rows, 128, requires_grad=True)


def gradients(linear, x, double=False):
    linear.zero_grad()
    y = linear(x).tanh()
    if not double:
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *linear.parameters()])]
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.norm(), [x, linear.weight])


@pytest.mark.parametrize("double", [False, True])
def test_a_layer_computes_the_same_by_onednn(onednn_is_faster, double):
    linear, x = layer()
    before = gradients(linear, x, double)
    with genai_fast.tune_cpu(memory=False) as tuning:
        assert tuning.onednn == dict.fromkeys(("output", "input gradient", "weight gradient"), 128 * 256 * 256)
        onednn_is_faster.clear()
        during = gradients(linear, x, double)
        assert set(onednn_is_faster) == set(tuning.onednn)
    exact = gradients(linear.double(), x.detach().double().requires_grad_(), double)
    for theirs, ours, true in zip(before, during, exact, strict=True):
        errors = [(y.double() - true).norm() / true.norm() for y in (theirs, ours)]
        assert errors[1] <= 2 * errors[0] + 1e-6


def test_afterwards_nothing_is_left(onednn_is_faster):
    linear, x = layer()
    before, threads = gradients(linear, x), torch.get_num_threads()
    tuning = genai_fast.tune_cpu(memory=False)
    assert genai_fast.tune_cpu() is tuning is cpu.active()
    tuning.remove()
    tuning.remove()
    onednn_is_faster.clear()
    after = gradients(linear, x)
    assert not onednn_is_faster and cpu.active() is None and torch.get_num_threads() == threads
    assert all(map(torch.equal, before, after))


def test_what_does_not_fit_goes_where_it_went(onednn_is_faster):
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    wide = torch.randn(256, 600)
    calls = {
        "float64": lambda: a.double() @ b.double(),
        "beta": lambda: torch.addmm(torch.ones(256), a, b, beta=0.5),
        "a matrix added": lambda: torch.addmm(torch.ones(256, 256), a, b),
        "small": lambda: a[:4] @ b,
        "a slice of a weight": lambda: a @ wide.t()[:256],
        "empty": lambda: a[:0] @ b,
        "scattered": lambda: wide[:, ::2][:, :256] @ b,
        "bfloat16": lambda: a.bfloat16() @ b.bfloat16(),
    }
    before = {name: call() for name, call in calls.items()}
    with genai_fast.tune_cpu(memory=False):
        onednn_is_faster.clear()
        for name, call in calls.items():
            assert torch.equal(call(), before[name]), name
        assert not onednn_is_faster


def test_a_size_that_is_slower_stays(onednn_is_faster, monkeypatch):
    slower = cpu._SHAPES[1]
    monkeypatch.setattr(
        autotune, "choose", lambda family, shape, *others: autotune.Choice("torch" if shape == slower else "onednn", {})
    )
    a, b = torch.randn(512, 256), torch.randn(256, 512)
    with genai_fast.tune_cpu(memory=False):
        onednn_is_faster.clear()
        torch.mm(a, b)
        assert not onednn_is_faster
        torch.mm(a.repeat(24, 1), b)
        assert onednn_is_faster == ["input gradient"]


def test_an_inexact_library_is_refused(onednn_is_faster, monkeypatch):
    compute = cpu._onednn
    monkeypatch.setattr(cpu, "_onednn", lambda bias, a, b: compute(bias, a.bfloat16().float(), b))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with genai_fast.tune_cpu(memory=False) as tuning:
            assert tuning.onednn == {}
    said = [str(w.message) for w in caught if w.category is genai_fast.FallbackWarning]
    assert len(said) == 3 and all("are unchanged: oneDNN's relative error is" in text for text in said)


def test_deterministic_runs_keep_torchs_library(pinned):
    assert autotune.pinned()
    with genai_fast.tune_cpu(memory=False) as tuning:
        assert tuning.onednn == {} and "by PyTorch's own library" in str(tuning)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_a_step_that_ran_before_takes_no_new_pages():
    """In a process of its own, as thresholds stay; of 64 MiB: by itself glibc keeps blocks of up to 32."""
    code = (
        "import resource, torch, genai_fast\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(5): torch.ones(1 << 24, device='cpu') + 1\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); stock = faults()\n"
        "tuning = genai_fast.tune_cpu(matmul=False); faults(); kept = faults()\n"
        "print(stock, kept, tuning)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    stock, kept, said = done.stdout.split(maxsplit=2)
    assert "freed memory kept" in said
    assert int(kept) * 4 < int(stock), done.stdout  # a heap that is cut up may grow once more


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    with pytest.warns(genai_fast.FallbackWarning, match="LD_PRELOAD"), genai_fast.tune_cpu(matmul=False) as tuning:
        assert not tuning.memory


def test_threads_keep_to_the_cores_allowed(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "allowed_cores", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with genai_fast.tune_cpu(memory=False, matmul=False) as tuning:
            assert tuning.threads == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
