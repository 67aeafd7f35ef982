"""The fuzzer of files finds what it looks for, and says how to see it again."""

import random

import pytest

from bench import fuzz_files
from genai_fast.errors import UsageError


@pytest.mark.parametrize("kind", fuzz_files.KINDS)
def test_undamaged_files_are_read(kind):
    if kind in ("wav", "flac", "ogg"):
        pytest.importorskip("soundfile", reason="pip install .[audio]")
    assert fuzz_files.load(f"{kind}-sound") is not None


def test_the_same_seed_damages_alike():
    raw = bytes(range(256))
    found = [fuzz_files.mutated(raw, random.Random(seed)) for seed in (*range(50), *range(50))]
    assert found[:50] == found[50:] and sum(x != raw for x in found[:50]) > 40


def fails(error):
    def read(path):
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda path: None, ""),
        (fails(UsageError("one line")), ""),
        (fails(UsageError("two\nlines")), "message of several lines"),
        (fails(KeyError("x")), "KeyError in test_fuzz_files.py:"),
        (fails(MemoryError()), "MemoryError in"),
    ],
)
def test_what_is_a_finding(monkeypatch, read, expected):
    monkeypatch.setitem(fuzz_files.KINDS, "txt", (fuzz_files.KINDS["txt"][0], read))
    monkeypatch.setattr(fuzz_files, "_peak", lambda: 0)
    found = fuzz_files.finding("txt-1")
    assert found == "" if not expected else expected in found


def test_processor_time_is_bounded(monkeypatch):
    seconds = iter((0.0, 2 * fuzz_files.SECONDS))
    monkeypatch.setattr(fuzz_files.time, "process_time", lambda: next(seconds))
    assert fuzz_files.finding("txt-sound") == "took 2.0 s of processor time"


def test_memory_is_bounded(monkeypatch):
    peaks = iter((0, 2 * fuzz_files.BYTES))
    monkeypatch.setattr(fuzz_files, "_peak", lambda: next(peaks))
    assert fuzz_files.finding("txt-sound") == "held 512 MiB"


def test_a_process_that_a_file_ends_is_a_finding(monkeypatch, capsys):
    """And the closing line counts it."""

    def run(command, batches, done, **limits):
        (first, *others), *_ = batches
        done(first, {"died": "the process ended with -11: "})
        for task in others:
            done(task, {"failures": {}})

    monkeypatch.setattr(fuzz_files.processes, "run", run)
    monkeypatch.setattr(fuzz_files.sys, "argv", ["fuzz_files", "--count", "4", "--seed", "9"])
    assert fuzz_files.main() == 1
    *_, finding, closing = capsys.readouterr().out.splitlines()
    assert finding.endswith("-9: the process ended with -11: ")
    assert closing.startswith("4 damaged files from seed 9, findings: 1 checkpoint")
