"""The GPU gate's logic, on the CPU: what it checks, what it survives, where it stops and goes on."""

import json
import math

import pytest
import torch

from bench import points
from bench.gpu_gate import __main__ as gpu_gate
from bench.gpu_gate import gate as gates
from bench.gpu_gate import large, parity
from bench.gpu_gate import runs as checks
from bench.report import records
from genai_fast import ops
from genai_fast.autotune import processor
from genai_fast.kernels.common.extension import extension
from genai_fast.registry import OPS
from genai_fast.testing import Run

VAE_LOSS, REPARAMETERIZE = OPS["vae_loss"], OPS["reparameterize"]


def point_of(op, case=0):
    return points.Point(op, op.bench_cases[case], torch.float32, "cpu")


def idle(step):
    """A broken capture: its replay does nothing."""
    return (lambda: None), step()


def frozen(step):
    """A broken capture: random numbers stay those of the capture."""
    state = torch.get_rng_state()
    replay, outputs = checks._again(step)

    def again():
        torch.set_rng_state(state)
        replay()

    return again, outputs


@pytest.fixture
def runs():
    if extension()[0] is None:
        pytest.skip(extension()[1])

    def of(op, *names):
        return [Run(op, case, torch.float32, "cpu", "cpu") for case in op.cases if case.name in names]

    return of


def test_run_that_is_right_is_green(runs, monkeypatch):
    kinds = []
    for kind, name in (("numerics", "numerics"), ("determinism", "determinism"), ("graph", "graph_replay")):
        check = getattr(checks, name)
        monkeypatch.setattr(checks, name, lambda *a, k=kind, check=check: (kinds.append(k), check(*a))[1])
    for run in runs(REPARAMETERIZE, "latent_20", "empty_batch", "heads"):
        assert checks.check(run, checks._again) == {}
    assert kinds == ["numerics", "determinism", "graph"] * 3


@pytest.mark.parametrize(("capture", "message"), [(idle, "differ from eager's"), (frozen, "draw the same numbers")])
def test_broken_graph_is_red(runs, capture, message):
    (run,) = runs(REPARAMETERIZE, "latent_20")
    found = checks.check(run, capture)
    assert list(found) == ["graph"]
    assert message in found["graph"]


def test_op_that_is_not_deterministic_is_red(runs, monkeypatch):
    right = ops.reparameterize
    # A few units in the last place: within the tolerance of numerics, and not the same bits.
    monkeypatch.setattr(ops, "reparameterize", lambda *a, **k: right(*a, **k) * (1.0 + 2e-7 * torch.randint(4, ())))
    torch.manual_seed(1)
    (run,) = runs(REPARAMETERIZE, "latent_20")
    assert checks.numerics(run) == ""
    assert "differ in their bits" in checks.determinism(run)


def test_op_that_raises_is_red_not_fatal(runs, monkeypatch):
    def fail(*arguments, **settings):
        raise RuntimeError("launch failed")

    monkeypatch.setattr(ops, "vae_loss", fail)
    (run,) = runs(VAE_LOSS, "odd")
    found = checks.check(run, checks._again)
    assert set(found) == {"numerics", "determinism", "graph"}
    assert "launch failed" in found["numerics"]


def test_where_the_reference_serves_only_numbers_are_checked(monkeypatch):
    def never(*arguments):
        raise AssertionError("the reference of adam_step reads numbers on the host")

    monkeypatch.setattr(checks, "determinism", never)
    monkeypatch.setattr(checks, "graph_replay", never)
    for name in ("adam_step", "gpt_decode"):
        op = OPS[name]
        monkeypatch.setattr(checks, "fused_backend", lambda op, device: points.fused_backend(op, "cuda"))
        assert checks.fused_backend(op, "cpu") == "reference"  # as planned: there is no kernel for CUDA
        assert checks.check(Run(op, op.cases[0], torch.float32, "reference", "cpu")) == {}


def test_bits_tell_nan_and_signed_zero():
    nan = torch.tensor([float("nan"), 0.0])
    assert checks._same([nan], [nan.clone()])
    assert not checks._same([nan], [torch.tensor([float("nan"), -0.0])])


def test_large_tensors_are_compared_with_their_last_rows(monkeypatch):
    for name in large.LARGE:
        assert large.wrong(name, "cpu", 100_000, torch.float32) == ""
    right = ops.layer_norm

    def overflowing(x):
        y = right(x)
        return torch.cat([y[:-1], y[:1]]) if len(y) > 10 else y

    monkeypatch.setattr(ops, "layer_norm", overflowing)
    assert large.wrong("layer_norm", "cpu", 100_000).startswith("output: the last 3 of")


def test_large_tensors_are_gone_once_their_last_rows_are_taken(monkeypatch):
    equal, held = torch.equal, []

    def seen(a, b):
        held.extend(x.untyped_storage().nbytes() / x.nbytes for x in (a, b))
        return equal(a, b)

    monkeypatch.setattr(torch, "equal", seen)
    assert large.wrong("layer_norm", "cpu", 100_000, torch.float32) == ""
    assert held == [1.0] * 4  # outputs and gradients


def test_parity_wants_curves_that_move_and_agree():
    plain = [10.0 - 0.1 * k for k in range(50)]
    assert parity.wrong({"plain": plain, "fused": [x * 1.01 for x in plain]}, 0.02) == ""
    assert "got 10.027" in parity.wrong({"plain": plain, "fused": [x * 1.05 for x in plain]}, 0.02)
    assert "got nan" in parity.wrong({"plain": plain, "fused": [math.nan] * 50}, 0.02)
    assert "nothing is proved" in parity.wrong({"plain": [10.0] * 50, "fused": [10.0] * 50}, 0.02)


def test_parity_of_a_model():
    found = parity.curves("mlp_vae", "cpu", 20)
    assert parity.wrong(found, 0.05) == ""
    assert found["plain"] != found["fused"] and len(found["fused"]) == 20


def test_without_a_gpu_the_gate_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert gpu_gate.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_the_whole_gate_stops_in_time_and_goes_on(monkeypatch, tmp_path, quick):
    """On the CPU, with a few runs of one op, in processes as anywhere."""
    if extension()[0] is None:
        pytest.skip(extension()[1])
    backend = points.fused_backend(VAE_LOSS, "cpu")
    few = [Run(VAE_LOSS, case, torch.float32, backend, "cpu") for case in VAE_LOSS.cases[:3]]
    monkeypatch.setattr(gates, "WORKER", "tests.bench.quick_worker")
    path = tmp_path / "record.json"

    def gate(content):
        return gates.Gate(path, content, gpu_gate.tasks_of("cpu", few, [point_of(VAE_LOSS)]), "cpu")

    first = gate(gpu_gate.begin("cpu", "abc"))
    gpu_gate.perform(first, minutes=0.0, jobs=1)
    assert not first.through() and not first.green()
    left = json.loads(path.read_text())["left"]
    runs, point = [str(run) for run in few], str(point_of(VAE_LOSS))
    assert left == {"runs": runs, "figures": [point], "checks": [*records.CHECKS]}
    second = gate(json.loads(path.read_text()))
    gpu_gate.perform(second, minutes=5.0, jobs=1)
    assert second.through() and second.green()
    found = json.loads(path.read_text())
    assert found["commit"] == "abc" and found["green"] and found["through"] and found["left"] == {}
    assert set(found["runs"]) == {str(run) for run in few} and found["environment"]["torch"] == torch.__version__
    assert set(found["figures"][str(point_of(VAE_LOSS))]["variants"]) >= {"fused", "compile"}
    read = records.read(path)
    assert read.green and read.device.startswith(processor())
