"""What a GPU gate does, in which order, and what of it counts; no process is started but stand-ins for tools."""

import argparse
import json
import math
import os

import pytest
import torch

from bench import points
from bench.gpu_gate import __main__ as gpu_gate
from bench.gpu_gate import barrier, figures, large, memory, processes
from bench.gpu_gate import gate as gates
from bench.report import files, records
from genai_fast.kernels.common import tuned
from genai_fast.registry import OPS
from genai_fast.testing import Run

VAE_LOSS, REPARAMETERIZE = OPS["vae_loss"], OPS["reparameterize"]


def point_of(op, case=0):
    return points.Point(op, op.bench_cases[case], torch.float32, "cpu")


def gate_of(tmp_path, points, tasks=None, **content):
    tasks = tasks or {"runs": [["vae_loss-a"], ["reparameterize-a"]]}
    content.setdefault("commit", "abc")
    figures = {stage: [[*map(str, points)]] for stage in ("figures", "compiled")}
    return gates.Gate(tmp_path / "record.json", content, figures | tasks, "cpu")


GOOD, BAD = {"failures": {}}, {"failures": {"numerics": "wrong"}}
LACKING = {"failures": {"raised": "OutOfMemoryError: CUDA out of memory. Tried to allocate 4.00 GiB"}}


@pytest.fixture
def stand_in(monkeypatch):
    """Processes that were asked for, and `said`: their results by task; GOOD or a figure for all others."""
    asked, said = [], {}

    def run(command, batches, done, **limits):
        *_, module, _, options = command
        assert command[2] == gates.WORKER
        asked.append((module, [*batches], limits))
        compiled = {"compile": {}} if json.loads(options).get("compiled") else {}
        for task in (task for batch in batches for task in batch):
            if task == "breaks the stage":
                raise OSError("no more processes")
            figure = {"op": task.partition("-")[0], "variants": {"fused": {}, **compiled}}
            done(task, dict(said.get(task, figure if module == "figures" else GOOD)))

    monkeypatch.setattr(processes, "run", run)
    return asked, said


def measured(gate, compiled=False):
    gate.run_stage("compiled" if compiled else "figures", math.inf)
    return {name: "compile" in f["variants"] for name, f in gate.content["figures"].items() if "variants" in f}


def refused(gate):
    return {name: r["failures"] for name, r in gate.content["figures"].items() if records.failures(r)}


def test_no_figure_without_a_green_gate(tmp_path, stand_in):
    asked, said = stand_in
    todo = [point_of(VAE_LOSS), point_of(REPARAMETERIZE)]
    mine, other = map(str, todo)
    gate = gate_of(tmp_path, todo, runs={"vae_loss-a": GOOD, "reparameterize-a": BAD})
    for compiled in (False, True):
        assert measured(gate, compiled) == {mine: compiled}
    assert refused(gate) == {other: {"gate": "the gate of reparameterize is red"}}
    # It waits for what may yet be right, and is measured once it is.
    del gate.content["runs"]["reparameterize-a"]
    assert measured(gate) == {mine: True} and refused(gate) == {}
    assert gate.left()["figures"] == [other]
    gate.content["runs"]["reparameterize-a"] = GOOD
    assert measured(gate) == {mine: True, other: False}
    gate.content["runs"]["reparameterize-a"] = BAD  # nor does a former one stay
    assert measured(gate) == {mine: True} and list(refused(gate)) == [other]
    # Nor if the op is green elsewhere but wrong on the very case that would be timed.
    gate = gate_of(tmp_path, todo[:1], runs={"vae_loss-a": GOOD})
    said[mine] = BAD
    assert measured(gate) == {} and refused(gate) == {mine: BAD["failures"]} and not gate.green()
    count = len(asked)
    assert measured(gate) == {} and asked[count][1] == []  # that is final


def test_a_point_that_ends_its_process_is_refused_but_not_for_torch_compile(tmp_path, stand_in):
    _, said = stand_in
    point = point_of(VAE_LOSS)
    gate = gate_of(tmp_path, [point], runs={"vae_loss-a": GOOD})
    assert measured(gate) == {str(point): False}
    said[str(point)] = {"died": "the process ended with -11: "}
    assert measured(gate, compiled=True) == {str(point): True} and refused(gate) == {}
    compiled = gate.content["figures"][str(point)]["variants"]["compile"]
    assert compiled == {"skipped": "died: the process ended with -11: "}
    for result, again in ((said[str(point)], False), (LACKING, True), ({"died": "no end after 180 s"}, True)):
        said[str(point)] = result
        gate = gate_of(tmp_path, [point], runs={"vae_loss-a": GOOD})
        assert measured(gate) == {} and gate.left().get("figures", []) == []
        gate.retry()
        assert gate.left().get("figures", []) == [str(point)] * again


def test_no_training_figure_where_the_curve_is_red(tmp_path, stand_in):
    asked, _ = stand_in
    tasks = {"parity": [["lstm"]], "training": [["mlp_vae"], ["lstm"], ["mlp_gan"]]}
    gate = gate_of(tmp_path, [], tasks, parity={"mlp_vae": BAD, "lstm": GOOD})
    gate.run_stage("training", math.inf)
    assert asked[-1][1] == [["lstm"], ["mlp_gan"]]
    found = gate.content["training"]
    assert found["mlp_vae"] == {"failures": {"gate": "parity of mlp_vae is red"}} and not gate.green()
    # What is done stays done, but for what the curve alone forbade.
    gate.run_stage("training", math.inf)
    assert asked[-1][1] == []
    gate.content["parity"]["mlp_vae"] = GOOD
    gate.run_stage("training", math.inf)
    assert asked[-1][1] == [["mlp_vae"]] and found["mlp_vae"] == GOOD


def test_launches_that_nobody_searched_keep_no_verdict_waiting(tmp_path):
    done = dict(runs={"a": GOOD}, barrier_check={"passed": True}, memory_check={"passed": True})
    gate = gate_of(tmp_path, [], {"runs": [["a"]], "tuning": [["t", "u"]]}, **done)
    assert gate.left() == {"tuning": ["t", "u"]} and gate.through() and gate.green()
    gate.content["tuning"]["t"] = BAD
    assert gate.through() and not gate.green()


def test_what_failed_for_lack_of_memory_or_time_is_tried_once_more(tmp_path):
    lost = {"failures": {**LACKING["failures"], "device": "the device's context is lost"}}
    results = {"a": GOOD, "b": BAD, "c": LACKING, "d": {"died": "no end after 180 s"}, "e": lost}
    results |= {"f": {"died": "the process ended with -9: "}, "g": {"died": "the process ended with -6: "}}
    check = {"skipped": "12 s were left", "again": True}
    tasks = {"runs": [[*results, "never"]], "figures": [["p", "q"]]}
    gate = gate_of(tmp_path, [], tasks, runs=dict(results), figures={"p": LACKING, "q": BAD}, memory_check=check)
    assert gate.left() == {"runs": ["never"], "checks": ["barrier_check"]}
    gate.retry()
    assert gate.left() == {"runs": ["c", "d", "f", "never"], "figures": ["p"], "checks": [*records.CHECKS]}
    gate.content["runs"] |= results
    gate.retry()
    assert gate.left()["runs"] == ["never"]


def test_a_stage_that_fails_ends_no_other(tmp_path, stand_in):
    tasks = {"runs": [["breaks the stage"]], "decoding": [["gpt2"]]}
    gate = gate_of(tmp_path, [], tasks, barrier_check={"passed": True})
    gpu_gate.perform(gate, 1.0, 1)
    found = records_of(gate)
    assert found["errors"] == {"runs": "OSError: no more processes"} and found["decoding"] == {"gpt2": GOOD}
    assert found["left"] == {"runs": ["breaks the stage"]} and not found["green"]
    gate = gate_of(tmp_path, [], {**tasks, "runs": [["a"]]}, **found)
    gpu_gate.perform(gate, 1.0, 1)
    assert records_of(gate)["errors"] == {} and gate.green()


def records_of(gate):
    return json.loads(gate.path.read_text())


def test_stages_go_in_order_as_many_at_once_as_the_device_bears(tmp_path, monkeypatch, stand_in):
    asked, _ = stand_in
    point = point_of(VAE_LOSS)
    tasks = {"runs": [["vae_loss-a"], ["vae_loss-b", "vae_loss-c"]], "large": [["x", "y"]], "parity": [["lstm"]]}
    tasks |= {"training": [["mlp_vae"]], "decoding": [["gpt2"]], "tuning": [["t"]]}
    gate = gate_of(tmp_path, [point], tasks, barrier_check={"passed": True})
    gpu_gate.perform(gate, 1.0, jobs=8)
    stages = [stage for stage in gpu_gate.STAGES if stage not in ("barrier", "memory")]
    assert [module for module, *_ in asked] == ["figures" if s == "compiled" else s for s in stages]
    by_stage = dict(zip(stages, asked, strict=True))
    assert by_stage["runs"][1] == [["vae_loss-b", "vae_loss-c"], ["vae_loss-a"]]  # the longest first
    assert by_stage["large"][1] == [["x", "y"]] and by_stage["compiled"][1] == [[str(point)]]
    jobs = {stage: limits["jobs"] for stage, (*_, limits) in by_stage.items()}
    assert jobs == dict.fromkeys(stages, 1) | {"runs": 8, "parity": 8}
    slow = [stage for stage, (*_, limits) in by_stage.items() if limits["silent"] > processes.SILENT]
    assert slow == ["training", "decoding", "compiled", "tuning"]
    for stage, (*_, limits) in by_stage.items():
        own = (limits["environment"] or os.environ)["GENAI_FAST_CACHE"] != os.environ["GENAI_FAST_CACHE"]
        assert own == (jobs[stage] > 1), stage
    assert gate.green()
    # What is done stays done, and only what is asked for is asked about.
    asked.clear()
    gpu_gate.perform(gate, 1.0, jobs=8, stages=("large", "tuning"))
    assert [(module, batches) for module, batches, _ in asked] == [("large", []), ("tuning", [])]


def test_stages_are_checked():
    assert gpu_gate.stages_of("runs,memory") == ("runs", "memory")
    for text in ("run", "runs,,memory", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected some of barrier,runs"):
            gpu_gate.stages_of(text)


def test_tasks_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu_gate.tuning, "tasks", lambda device: [])
    ops = [(VAE_LOSS, ("reference", "triton")), (OPS["adam_step"], ("reference",))]
    every = [Run(op, op.cases[0], torch.float32, name, "cuda") for op, names in ops for name in names]
    tasks = gpu_gate.tasks_of("cuda", iter(every), [])
    assert tasks["runs"] == [[str(every[1])], [str(every[2])]]  # the reference where there is nothing else
    assert tasks["large"] == [[*large.LARGE]]
    assert gpu_gate.tasks_of("cpu", every[:1], [])["runs"] == [[str(every[0])]]


def test_figures_are_taken_again_when_their_launches_were_tuned(tmp_path, monkeypatch, stand_in):
    asked, said = stand_in
    todo = [point_of(VAE_LOSS), point_of(REPARAMETERIZE)]
    mine, other = map(str, todo)
    tasks = {"runs": [["vae_loss-a"], ["reparameterize-a"]], "training": [["mlp_gan"]], "tuning": [["t", "u"]]}
    gate = gate_of(tmp_path, todo, tasks, barrier_check={"passed": True}, memory_check={"skipped": ""})
    for name, launches in ((mine, ["vae_loss/forward"]), (other, ["reparameterize/forward"])):
        said[name] = {"op": "x", "variants": {"fused": {}, "compile": {}}, "launches": launches}
    said["mlp_gan"] = {"variants": {"fused": {}}}
    kernel = {"failures": {}, "settings": {}, "dtype": "float32", "shape": [1], "default": {}}
    said["t"] = {**kernel, "kernel": "vae_loss/forward"}
    said["u"] = {**kernel, "kernel": "reparameterize/forward"}
    tuned = {}
    monkeypatch.setattr(gates, "in_force", lambda result, device: tuned.get(result["kernel"], 0))
    monkeypatch.setattr(gates.tuning, "write", lambda *_: (tuned.update({"vae_loss/forward": 1}), ["kernels/a"])[1])
    gpu_gate.perform(gate, 1.0, 1)
    assert gate.content["tuned"] == ["vae_loss/forward"]
    assert gate.content["tuning"]["t"]["changed"] and not gate.content["tuning"]["u"]["changed"]
    # Of a whole step nobody knows which launches it has.
    assert gate.left() == {gates.AGAIN: [mine, "mlp_gan"]} == records_of(gate)["left"]
    assert gate.written == {gate.path, files.ROOT / "kernels/a"}
    asked.clear()
    gpu_gate.perform(gate, 1.0, 1)
    again = [(module, batches) for module, batches, _ in asked if batches]
    assert again == [("training", [["mlp_gan"]]), ("figures", [[mine]])]
    assert gate.green()


def test_the_command_line(tmp_path, monkeypatch, stand_in, capsys):
    _, said = stand_in
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_gate.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu_gate, "every_run", lambda devices: [])
    monkeypatch.setattr(gpu_gate, "points", lambda device: [])
    monkeypatch.setattr(gpu_gate, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(gpu_gate, "begin", lambda _, commit: {"commit": commit, "environment": {"device": "a GPU"}})
    monkeypatch.setattr(gpu_gate, "tasks_of", lambda *_: {"runs": [["a", "b"]]})
    monkeypatch.setattr(gates.Gate, "check", lambda gate, name, work, deadline: gate.content.update({name: {}}))
    path = tmp_path / "record.json"
    said["a"] = LACKING

    def main(*more):
        return gpu_gate.main(["--out", str(path), "--commit", "abc", *more]), capsys.readouterr().out.splitlines()

    code, lines = main("--stages", "runs")
    assert code == 3 and lines[0] == "device: a GPU"
    assert lines[-3:] == ["left, checks: 1", "not through: --continue", f"written: {path}"]
    code, lines = main("--continue", "--stages", "memory")
    assert code == 3 and "left, runs: 1" in lines  # for lack of memory: it is tried again when that is asked for
    said["a"] = GOOD
    code, lines = main("--continue")
    assert code == 0 and lines[-2:] == ["green", f"written: {path}"]
    with pytest.raises(SystemExit):
        main("--stages", "everything")


def test_settings_in_force():
    found = {"kernel": "vae_loss/forward", "dtype": "float32", "shape": [8, 8], "default": {"num_warps": 4}}
    assert gates.in_force(found, "cpu") == {"num_warps": 4}


def test_a_point_says_which_launches_it_has(monkeypatch):
    point = point_of(VAE_LOSS)
    monkeypatch.setattr(figures, "figures", lambda point, compiled: {"compiled": compiled})

    def step(self, variant):
        x = torch.empty(0)
        return lambda: [tuned.launch(name, x, (1,)) for name in ("b/y", "b/y", "a/x")]

    monkeypatch.setattr(points.Point, "step", step)
    assert figures.measure(point, True) == {"compiled": True, "launches": ["a/x", "b/y"]}
    monkeypatch.setattr(figures, "red", lambda point: "wrong")
    assert figures.measure(point, True) == {"failures": {"numerics": "wrong"}}


TOOL = """#!/bin/sh
{}
"""


@pytest.mark.parametrize(
    ("script", "limit", "expected"),
    [
        ("echo fine", 600.0, {"passed": True, "output": "fine\n"}),
        ("echo found; exit 9", 600.0, {"passed": False, "output": "found\n"}),
        ("echo '===== Error: Device not supported'; exit 9", 600.0, "here: ===== Error: Device not supported"),
        ("echo no driver; exit 1", 600.0, "here: it ended with 1: no driver"),
        ("sleep 30", 1.0, "took more than 1 s"),
        ("sleep 30", -3.0, "0 s were left, it needs at least 60"),
    ],
)
def test_the_memory_check_is_red_only_where_something_was_found(monkeypatch, tmp_path, script, limit, expected):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(script))
    tool.chmod(0o755)
    monkeypatch.setattr(memory.shutil, "which", lambda name: str(tool))
    if limit > 0:
        monkeypatch.setattr(memory, "SHORTEST", 0.0)
    found = memory.memory_check(limit)
    if isinstance(expected, dict):
        assert found == expected
    else:
        assert expected in found["skipped"] and found.get("again", False) == (limit < 60)


def test_the_barrier_is_given_the_time_that_is_left(monkeypatch):
    said = []
    monkeypatch.setattr(processes, "call", lambda command, limit: (said.append(limit), ending)[1])
    ending = (None, "gru 512: right\n")
    assert barrier.barrier_check(10.0) is None
    assert barrier.barrier_check(400.0)["output"] == "gru 512: right\nno end after 300 s"
    assert said == [10.0, 300.0]
    for code, key in ((0, "passed"), (1, "passed"), (2, "skipped")):
        ending = (code, "gru\n")
        assert barrier.barrier_check()[key] == {0: True, 1: False, 2: "gru"}[code]
