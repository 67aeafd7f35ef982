"""In which precision float32 is multiplied on a GPU while numbers are compared: the switches are there without one."""

from types import SimpleNamespace

import pytest
import torch

from bench.gpu_gate import parity, runs, training
from genai_fast import ops, testing
from genai_fast.precision import float32_products
from genai_fast.profiling.systems import SYSTEMS
from genai_fast.registry import OPS
from genai_fast.testing import AUTOMATIC, Run, assert_matches_reference, assert_second_derivative, every_run

CONV = OPS["conv_transpose2d"]


def switches():
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    return tuple(switch.fp32_precision for switch in kinds)


EXACT, DEFAULT = ("ieee",) * 3, switches()


def conv_run(case="odd", **more):
    return Run(CONV, next(c for c in CONV.cases if c.name == case), torch.float32, AUTOMATIC, "cpu", **more)


def test_products_are_in_full_meanwhile_and_then_as_before():
    with float32_products():
        assert switches() == EXACT
        with float32_products(convolutions="tf32"):
            assert switches() == ("ieee", "tf32", "tf32")
        assert switches() == EXACT
    with pytest.raises(ValueError, match="what is raised"), float32_products():
        raise ValueError("what is raised")
    assert switches() == DEFAULT and DEFAULT[1] == "tf32"


def test_each_convolution_has_one_run_in_tf32_on_a_gpu(monkeypatch):
    monkeypatch.setattr(testing, "unavailable", lambda backend, device: "" if backend != "cpu" else "for CPU tensors")
    runs = list(every_run(("cuda",)))
    assert len({str(run) for run in runs}) == len(runs)
    rounded = [str(run) for run in runs if run.tf32]
    assert rounded and rounded == [
        f"{op}-{op.cases[0]}-tf32-triton-cuda"
        for op in OPS.values()
        if op.folder in ("conv_transpose", "causal_conv1d")
    ]
    assert not any(run.tf32 for run in every_run(("cpu",)))


@pytest.fixture
def seen(monkeypatch):
    """The switches at each call of the op, whose numbers are off by what is in `error`."""
    found, right = SimpleNamespace(switches=[], error=0.0), ops.conv_transpose2d

    def op(*arguments, **settings):
        found.switches.append(switches())
        return right(*arguments, **settings) * (1 + found.error)

    monkeypatch.setattr(ops, "conv_transpose2d", op)
    return found


def test_numbers_are_compared_in_the_precision_of_the_run(seen):
    exact, rounded = conv_run(), conv_run(tf32=True)
    assert_matches_reference(exact)
    assert_matches_reference(rounded)
    assert_second_derivative(conv_run("second_order"))
    assert seen.switches == [EXACT, ("ieee", "tf32", "tf32"), EXACT] and switches() == DEFAULT
    seen.error = 2.0**-11
    assert_matches_reference(rounded)
    with pytest.raises(AssertionError, match="conv_transpose2d-odd-float32-automatic-cpu: output 0: error"):
        assert_matches_reference(exact)
    seen.error = 2.0**-8
    with pytest.raises(AssertionError, match="conv_transpose2d-odd-tf32-automatic-cpu: output 0: error"):
        assert_matches_reference(rounded)


def test_the_gate_checks_second_derivatives_in_full_alone(monkeypatch):
    called = []
    monkeypatch.setattr(runs, "assert_second_derivative", called.append)
    exact = conv_run("second_order")
    assert runs.check(exact, runs._again) == {} == runs.check(conv_run("second_order", tf32=True), runs._again)
    assert called == [exact]


class Recorder:
    """Stands for a system: notes the precision of each of its steps."""

    plain_scale, tolerance = 1, 5e-3

    def __init__(self):
        self.steps = []

    def inputs(self, device):
        return (torch.zeros(2),)

    def plain(self, device):
        return self._step("plain")

    def fused(self, device):
        return self._step("fused")

    def _step(self, name):
        def step(*batch):
            self.steps.append((name, switches()))
            return torch.tensor(1.0)

        return step


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_losses_are_compared_in_full_along_the_paths_that_are_timed(device):
    system = Recorder()
    assert training.red(system, device, 2) == ""
    chosen = [("fused", DEFAULT)] * (device == "cuda")  # what chooses the paths
    assert system.steps == [*chosen, *[("plain", EXACT)] * 2, *[("fused", EXACT)] * 2]
    assert switches() == DEFAULT


def test_curves_are_compared_in_full(monkeypatch):
    system = Recorder()
    monkeypatch.setitem(SYSTEMS, "dcgan_64", system)
    monkeypatch.setattr(parity, "batches", lambda system, device: [(torch.zeros(2),)] * parity.BATCHES)
    assert set(parity.curves("dcgan_64", "cpu", 3)) == {"plain", "fused"}
    assert system.steps == [(side, EXACT) for side in ("plain", "fused") for _ in range(3)]
