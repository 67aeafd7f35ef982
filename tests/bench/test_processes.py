"""Tasks in other processes: what hangs, dies or prints nonsense takes nothing else along."""

import io
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu_gate import processes, worker
from bench.report import records

WORKER = """
import json, os, subprocess, sys, time
def say(message): print("@bench.gpu_gate " + json.dumps(message), flush=True)
for name in json.load(sys.stdin):
    print("chatter", flush=True)
    print('{-# external_resources: {} #-}', flush=True)
    sys.stdout.buffer.write(b"\\xff no end of this line ")
    say({"begin": name})
    if name.startswith("/"):
        child = subprocess.Popen(["sh", "-c", "sleep 60; echo > " + name + ".ended"])
        with open(name, "w") as file: file.write(str(child.pid))
    if "hangs" in name: time.sleep(60)
    if name == "dies": os._exit(7)
    say({"run": name, "failures": {"numerics": "wrong"} if name == "wrong" else {}})
    if name == "breaks": sys.exit(3)
    if name == "aborts": os.abort()
"""


def run(batches, **limits):
    found = {}
    limits = {"jobs": 2, "deadline": time.monotonic() + 100, "silent": 5.0, **limits}
    processes.run([sys.executable, "-c", WORKER], batches, found.__setitem__, **limits)
    return found


def test_tasks_that_hang_or_die_take_no_others_along():
    found = run([["a", "dies", "b", "wrong"], ["hangs", "c"], ["breaks", "d", "aborts", "e"]], jobs=3)
    right = {"a", "b", "breaks", "c", "d", "aborts", "e"}
    assert {name for name, result in found.items() if not records.failures(result)} == right
    assert found["dies"]["died"].startswith("the process ended with 7: chatter")
    assert found["hangs"]["died"] == "no end after 5 s"
    assert records.failures(found["wrong"]) == {"numerics": "wrong"}


def test_what_compilers_print_is_no_message():
    assert processes.parsed("{-# external_resources: {} #-}\n") is None
    assert processes.parsed('{"begin": "a"}\n') is None
    assert processes.parsed(f"{worker.MARK}{{-# torn\n") is None
    assert processes.parsed(f'50 % {worker.MARK}{{"begin": "a"}}\n') == {"begin": "a"}


def running(pid):
    """Not what has ended and is still a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc")
def test_what_a_process_started_ends_with_it(tmp_path):
    ends, hangs = tmp_path / "ends", tmp_path / "hangs"
    assert set(run([[str(ends)]])) == {str(ends)}  # it has ended: its child keeps the pipe open
    assert run([[str(hangs)]], deadline=time.monotonic() + 3.0) == {}
    assert set(run([[str(hangs)]], silent=1.0)) == {str(hangs)}
    called = tmp_path / "call"
    child = f"(sleep 60; echo > {called}.ended) & echo $! > {called}"
    code, said = processes.call(["sh", "-c", f"echo begun; {child}; sleep 60"], 1.0)
    assert code is None and said == "begun\n"
    assert processes.call(["sh", "-c", "echo said; echo more >&2; exit 4"], 60.0) == (4, "said\nmore\n")
    assert not any(running((tmp_path / name).read_text().strip()) for name in ("ends", "hangs", "call"))
    assert not list(tmp_path.glob("*.ended"))  # they were not waited for


INTERRUPTED = """
import signal, sys, time
from bench.gpu_gate import processes
signal.signal(signal.SIGALRM, lambda *_: sys.exit(5))
signal.setitimer(signal.ITIMER_REAL, 2.0)
command = ["sh", "-c", "sleep 60; echo > " + sys.argv[1]]
processes.run(command, [["a"]], print, jobs=1, deadline=time.monotonic() + 100)
"""


def test_an_interrupt_waits_for_no_task(tmp_path):
    ended = tmp_path / "ended"
    assert processes.call([sys.executable, "-c", INTERRUPTED, str(ended)], 120.0)[0] == 5
    assert not ended.exists()


def test_a_process_says_what_was_wrong_and_ends_where_its_device_is_lost(monkeypatch, capsys):
    def work(task):
        if task == "raises":
            raise ValueError("what it is")
        return {"failures": {"numerics": "wrong"} if task == "wrong" else {}, "figure": 1}

    def serve(*tasks):
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(tasks)))
        code = worker.serve(work)
        return code, said()

    def said():
        lines = [processes.parsed(line) for line in capsys.readouterr().out.splitlines()]
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
    assert run([["hangs"]], deadline=time.monotonic() + 1.0) == {}
    assert run([["a"]], deadline=time.monotonic()) == {}
    found = {}
    processes.run(["false"], [["a", "b"]], found.__setitem__, jobs=1, deadline=time.monotonic() + 10)
    assert {r["died"] for r in found.values()} == {"the process ended with 1: "} and set(found) == {"a", "b"}
