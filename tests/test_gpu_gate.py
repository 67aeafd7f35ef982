"""The GPU gate's logic, on the CPU: what it checks, what it survives, where it stops and goes on."""

import io
import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import checks, gpu_gate, isolated, large, parity, points, record, records
from genai_fast import ops
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
    monkeypatch.setattr(
        ops, "reparameterize", lambda *a, **k: right(*a, **k) * (1.0 + 2e-7 * torch.randint(0, 4, ()).float())
    )
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


WORKER = """
import json, os, subprocess, sys, time
def say(message): print("@bench.isolated " + json.dumps(message), flush=True)
for name in json.load(sys.stdin):
    print("chatter", flush=True)
    print('{-# external_resources: {} #-}', flush=True)
    sys.stdout.buffer.write(b"\\xff no end of this line ")
    say({"begin": name})
    if name.startswith("/"):
        child = subprocess.Popen(["sleep", "60"])
        with open(name, "w") as file: file.write(str(child.pid))
    if "hangs" in name: time.sleep(60)
    if name == "dies": os._exit(7)
    say({"run": name, "failures": {"numerics": "wrong"} if name == "wrong" else {}})
    if name == "breaks": sys.exit(3)
    if name == "aborts": os.abort()
"""


def isolated_run(batches, **limits):
    found = {}
    limits = {"jobs": 2, "deadline": time.monotonic() + 100, "silent": 5.0, **limits}
    isolated.run([sys.executable, "-c", WORKER], batches, found.__setitem__, **limits)
    return found


def test_tasks_that_hang_or_die_take_no_others_along():
    found = isolated_run([["a", "dies", "b", "wrong"], ["hangs", "c"], ["breaks", "d", "aborts", "e"]], jobs=3)
    right = {"a", "b", "breaks", "c", "d", "aborts", "e"}
    assert {name for name, result in found.items() if not gpu_gate.failures(result)} == right
    assert found["dies"]["died"].startswith("the process ended with 7: chatter")
    assert found["hangs"]["died"] == "no end after 5 s"
    assert gpu_gate.failures(found["wrong"]) == {"numerics": "wrong"}


def test_what_compilers_print_is_no_message():
    assert isolated._message("{-# external_resources: {} #-}\n") is None
    assert isolated._message('{"begin": "a"}\n') is None
    assert isolated._message(f"{isolated.MARK}{{-# torn\n") is None
    assert isolated._message(f'50 % {isolated.MARK}{{"begin": "a"}}\n') == {"begin": "a"}


def running(pid):
    """Not what has ended and waits for somebody to ask how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc")
def test_what_a_process_started_ends_with_it(tmp_path):
    ends, hangs = tmp_path / "ends", tmp_path / "hangs"
    begun = time.monotonic()
    assert set(isolated_run([[str(ends)]])) == {str(ends)}  # it has ended: its child keeps the pipe open
    assert isolated_run([[str(hangs)]], deadline=time.monotonic() + 3.0) == {}
    assert set(isolated_run([[str(hangs)]], silent=1.0)) == {str(hangs)}
    assert time.monotonic() - begun < 30
    code, said = isolated.call(["sh", "-c", f"echo begun; sleep 60 & echo $! > {tmp_path / 'call'}; sleep 60"], 1.0)
    assert code is None and said == "begun\n"
    assert isolated.call(["sh", "-c", "echo said; echo more >&2; exit 4"], 60.0) == (4, "said\nmore\n")
    assert not any(running((tmp_path / name).read_text().strip()) for name in ("ends", "hangs", "call"))


INTERRUPTED = """
import signal, sys, time
from bench import isolated
signal.signal(signal.SIGALRM, lambda *_: sys.exit(5))
signal.setitimer(signal.ITIMER_REAL, 2.0)
isolated.run(["sleep", "60"], [["a"]], print, jobs=1, deadline=time.monotonic() + 50)
"""


def test_an_interrupt_waits_for_no_task():
    begun = time.monotonic()
    assert isolated.call([sys.executable, "-c", INTERRUPTED], 60.0)[0] == 5
    assert time.monotonic() - begun < 40


def test_a_process_says_what_was_wrong_and_ends_where_its_device_is_lost(monkeypatch, capsys):
    def work(task):
        if task == "raises":
            raise ValueError("what it is")
        return {"failures": {"numerics": "wrong"} if task == "wrong" else {}, "figure": 1}

    def serve(*tasks):
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(tasks)))
        code = isolated.serve(work)
        return code, said()

    def said():
        lines = [isolated._message(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["begin"] for line in lines[::2]] == [line["run"] for line in lines[1::2]]
        return {line["run"]: line["failures"] for line in lines[1::2]}

    found = {"a": {}, "raises": {"raised": "ValueError: what it is"}, "wrong": {"numerics": "wrong"}}
    assert serve("a", "raises", "wrong") == (0, found)

    def lost():
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(os, "_exit", sys.exit)  # at once, as an orderly end aborts there
    with pytest.raises(SystemExit, match="3"):
        serve("wrong", "b")
    found = said()
    assert list(found) == ["wrong"] and found["wrong"]["numerics"] == "wrong"
    assert found["wrong"]["device"] == "the device's context is lost: an illegal memory access"


def test_what_is_not_done_in_time_stays_undone():
    assert isolated_run([["hangs"]], deadline=time.monotonic() + 1.0) == {}
    assert isolated_run([["a"]], deadline=time.monotonic()) == {}
    found = {}
    isolated.run(["false"], [["a", "b"]], found.__setitem__, jobs=1, deadline=time.monotonic() + 10)
    assert {r["died"] for r in found.values()} == {"the process ended with 1: "} and set(found) == {"a", "b"}


def gate_of(tmp_path, points, **content):
    return gpu_gate.Gate(tmp_path / "record.json", content, {"runs": [["vae_loss-a"], ["reparameterize-a"]]}, points)


def test_no_figure_without_a_green_gate(tmp_path):
    good, bad = {"failures": {}}, {"failures": {"numerics": "wrong"}}
    todo = [point_of(VAE_LOSS), point_of(REPARAMETERIZE)]

    def measure(point, compiled):
        return {"op": point.op.name, "variants": {"fused": {}, **({"compile": {}} if compiled else {})}}

    gate = gate_of(tmp_path, todo, runs={"vae_loss-a": good, "reparameterize-a": bad})
    for compiled in (False, True):
        gate.measure(math.inf, compiled, measure, lambda point: "")
        assert [f["op"] for f in gate.content["figures"]] == ["vae_loss"]
        assert ("compile" in gate.content["figures"][0]["variants"]) == compiled
    refused = gate.content["refused"]
    assert refused == [{"point": str(todo[1]), "reason": "the gate of reparameterize is red, or not through"}]
    # Nor where the op is green elsewhere but wrong on the very case that would be timed; nor when time is up.
    gate = gate_of(tmp_path, todo[:1], runs={"vae_loss-a": good})
    gate.measure(time.monotonic() - 1, False, measure, lambda point: "")
    assert gate.content["figures"] == gate.content["refused"] == []
    gate.measure(math.inf, False, measure, lambda point: "error 1 against float64")
    assert gate.content["refused"][0]["reason"] == "error 1 against float64"


def test_without_a_gpu_the_gate_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert gpu_gate.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_the_whole_gate_stops_in_time_and_goes_on(monkeypatch, tmp_path, quick):
    """On the CPU, with a few runs of one op."""
    if extension()[0] is None:
        pytest.skip(extension()[1])
    few = [Run(VAE_LOSS, case, torch.float32, gpu_gate_backend(), "cpu") for case in VAE_LOSS.cases[:3]]
    monkeypatch.setattr(points, "SECONDS", 0.0)
    path = tmp_path / "record.json"

    def gate(content):
        return gpu_gate.Gate(path, content, gpu_gate.tasks_of("cpu", few), [point_of(VAE_LOSS)])

    first = gate(gpu_gate.begin("cpu", "abc"))
    gpu_gate.perform(first, "cpu", minutes=0.0, jobs=1)
    assert not first.through() and not first.green()
    left = json.loads(path.read_text())["left"]
    assert left == {"runs": [str(run) for run in few], "figures": [str(point_of(VAE_LOSS))], "checks": ["memory_check"]}
    second = gate(json.loads(path.read_text()))
    gpu_gate.perform(second, "cpu", minutes=5.0, jobs=1)
    assert second.through() and second.green()
    found = json.loads(path.read_text())
    assert found["commit"] == "abc" and found["green"] and found["through"] and found["left"] == {}
    assert set(found["runs"]) == {str(run) for run in few} and found["environment"]["torch"] == torch.__version__
    assert set(found["figures"][0]["variants"]) >= {"fused", "compile"}
    read = records.read(path)
    assert read.green and read.device == record.processor()


def gpu_gate_backend():
    return points.fused_backend(VAE_LOSS, "cpu")
