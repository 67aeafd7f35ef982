"""The record of `pytest bench/`: it grows point by point, goes on, and is compared with a former one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import points, recording, roofs
from bench.bench_training import _QUICK
from bench.recording import Recording
from bench.report import __main__ as report
from bench.report import files, records, tables

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {
    "eager": {"wall_us": 30.0, "peak_bytes": 3 << 20},
    "compile": {"skipped": "no compiler"},
    "fused": {"wall_us": 10.0, "peak_bytes": 2 << 20},
}
FIGURE = {"op": "vae_loss", "case": "mnist-128x784", "dtype": "float32", "device": "cpu", "variants": VARIANTS}
FIGURE |= {"ratio": {"eager": 3.0}, "spread": {"eager": (2.9, 3.1)}, "foreign_load": 0.0}
EXPECTED = {"figures": ["a", "b"], "training": ["mlp_vae"]}
STEPS = [{**FIGURE, "op": "training step", "setting": s} for s in ("stock process", "tuned process")]


@pytest.fixture
def head(monkeypatch):
    monkeypatch.setattr(roofs, "roofs", lambda device: {"bytes_per_second": 4e10, "float32": 1e11})
    monkeypatch.setattr(files, "commit", lambda: ("abc1234567", False))
    return recording.begin("cpu")


def right():
    return ""


def test_each_point_is_on_disk_at_once_and_a_later_run_goes_on(tmp_path, head):
    path = tmp_path / "record.json"
    first = Recording(path, head, EXPECTED)
    assert first.measure("figures", "a", right, lambda: [FIGURE]) == [FIGURE]
    found = records.read(path)
    assert found.figures() == [json.loads(json.dumps(FIGURE))]
    assert not found.through and found.content["left"] == {"figures": ["b"], "training": ["mlp_vae"]}

    later = Recording(path, {}, EXPECTED)
    assert later.known("figures", "a") and not later.known("figures", "b") and not later.known("training", "mlp_vae")
    later.measure("figures", "b", right, lambda: [FIGURE])
    later.measure("training", "mlp_vae", right, lambda: STEPS)
    assert Recording(path, {}, EXPECTED).known("training", "mlp_vae")
    assert records.read(path).green


def test_what_was_measured_beside_other_programs_is_measured_again(tmp_path, head):
    found = Recording(tmp_path / "record.json", head, EXPECTED)
    found.measure("figures", "a", right, lambda: [{**FIGURE, "foreign_load": 0.3}])
    assert not found.known("figures", "a")
    found.measure("training", "mlp_vae", right, lambda: [STEPS[0], {**STEPS[1], "foreign_load": 0.3}])
    assert not found.known("training", "mlp_vae")
    found.measure("training", "mlp_vae", right, lambda: STEPS)
    assert found.known("training", "mlp_vae")


def test_a_wrong_result_is_recorded_and_not_clocked(tmp_path, head):
    found = Recording(tmp_path / "record.json", head, {"figures": ["a"]})
    with pytest.raises(AssertionError, match="off by one"):
        found.measure("figures", "a", lambda: "off by one", lambda: pytest.fail("clocked"))
    read = records.read(tmp_path / "record.json")
    assert read.verdict == "red" and read.wrong() == [("a", "gate: off by one")]


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Recording(None, {}, EXPECTED).measure("figures", "a", right, lambda: [FIGURE])
    assert not [*tmp_path.iterdir()]


def test_records_of_a_commit_and_device_have_one_place(tmp_path, head, monkeypatch):
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    path = recording.path_for(head)
    assert path.name == f"{head['date'][:10]}-abc1234567.json" and path.parent.parent == tmp_path
    path.parent.mkdir()
    earlier = path.with_name("2001-02-03-abc1234567.json")
    earlier.touch()
    assert recording.path_for(head) == earlier
    assert recording.path_for({**head, "dirty": True}).name.endswith("-abc1234567-dirty.json")


def test_the_report_is_made_of_it(tmp_path, head):
    found = Recording(tmp_path / "record.json", head, EXPECTED)
    for name in EXPECTED["figures"]:
        found.measure("figures", name, right, lambda: [FIGURE])
    found.measure("training", "mlp_vae", right, lambda: STEPS)
    assert report.main([str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert head["environment"]["device"] in page and "vae_loss mnist-128x784" in page and "## Training steps" in page
    assert "3.00" in page and (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_slower_is_beyond_the_noise_of_both():
    def content(low, high):
        return {"figures": {"a": {**FIGURE, "ratio": {"eager": low}, "spread": {"eager": (low, high)}}}}

    former = content(2.0, 2.2)
    assert recording.behind(content(1.5, 1.8), former) == ["a: 1.50 against eager, 2.00 before"]
    assert not recording.behind(content(1.5, 1.95), former)
    assert not recording.behind(content(3.0, 3.1), former)
    assert not recording.behind({"figures": {"b": FIGURE}}, former)


def test_the_summary_fits_100_columns():
    long = {**FIGURE, "case": "a" * 80, "dtype": "bfloat16", "foreign_load": 0.3}
    unknown = {**FIGURE, "op": "z", "variants": {"fused": {"wall_us": 1e6}}, "ratio": {}, "spread": {}}
    lines = tables.summary([unknown, long, FIGURE]).splitlines()
    table, notes = lines[:5], lines[5:]
    assert all(len(line) == 100 for line in table) and len(notes) == 3
    assert lines[1].split() == ["a" * 33, "bfloat16", "0.0100", "0.0300", "3.00", "2.90-3.10", "3.00", "67%"]
    assert lines[4].split() == ["mnist-128x784", "1000.0", *"-----"]


# The whole


def run(*arguments):
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--quick", *arguments]
    # Of the worker of pytest-xdist that this may be, which measures nothing.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)


def test_quick_takes_one_point_of_each_op_and_four_steps():
    lines = run("--collect-only", "-q").stdout.splitlines()
    ops = [line.partition("[")[2].partition("-")[0] for line in lines if line.startswith("bench/bench_ops.py::")]
    assert sorted(ops) == sorted({point.op.name for point in points.points(points.DEVICE)})
    steps = [line for line in lines if "test_training_step" in line]
    assert sorted(line.partition("[")[2].rstrip("]") for line in steps) == sorted(_QUICK)
    assert any("minutes" in line for line in lines)


def test_a_run_is_recorded_and_compared(tmp_path):
    record = tmp_path / "record.json"
    first = run("-k", "reparameterize-vae", "--record", str(record))
    assert first.returncode == 0 and "reparameterize " in first.stdout and str(record) in first.stdout, first.stdout
    (name,) = records.read(record).content["figures"]

    content = json.loads(record.read_text())
    figure = content["figures"][name]
    assert figure["ratio"].keys() == figure["spread"].keys() == {"eager"} and "fused" in figure["variants"]
    figure["spread"]["eager"] = [1e6, 1e6]
    (tmp_path / "former.json").write_text(json.dumps(content))
    second = run(
        "-k", "reparameterize-vae", "--record", str(tmp_path / "new.json"), "--against", str(tmp_path / "former.json")
    )
    assert second.returncode == 1 and f"SLOWER {name}" in second.stdout
