"""The doctor: complete here, and still standing where much is missing."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genai_fast
from genai_fast import autotune, backends
from genai_fast.cli import doctor
from genai_fast.profiling import machine
from genai_fast.registry import OPS
from genai_fast.training.environment import environment

BARE = """
import sys
sys.modules["genai_fast._cpu"] = None  # what an extension that does not load looks like
sys.modules["triton"] = None
from genai_fast import doctor
print(doctor.as_json(doctor.examine()))
"""


def test_it_covers_every_op_and_device():
    report = json.loads(doctor.as_json(doctor.examine()))
    assert report["versions"].items() >= {"torch": torch.__version__, "genai_fast": genai_fast.__version__}.items()
    assert set(report["ops"]) == set(OPS) and "cpu" in report["devices"]
    for by_device in report["ops"].values():
        assert set(by_device) == set(report["devices"])
        for served in by_device.values():
            assert {*served["backend"].split(" and "), *served["not"]} == set(backends.BACKENDS)
            assert all(served["not"].values())  # each with a reason
    text = doctor.as_text(report)
    assert all(op in text for op in OPS) and str(torch.get_num_threads()) in text


def _keys(value):
    if isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from _keys(inner)


def _refuse():
    raise RuntimeError("GENAI_FAST_ISA: expected one of portable on this processor, got 'sve9'; remedy: unset it, " * 2)


@pytest.mark.parametrize("right", [True, False])
def test_keys_are_identifiers_the_verdict_comes_first_and_lines_fit(monkeypatch, right):
    if not right:
        monkeypatch.setattr(doctor, "cpu_kernels", _refuse)
    report = doctor.examine()
    assert all(key.isidentifier() and key == key.lower() for key in _keys(report))
    assert list(report)[:2] == ["ok", "warnings"] and report["ok"] == (not report["warnings"])
    verdict, *lines = doctor.as_text(report).splitlines()
    assert report["ok"] is right and verdict.startswith("ok" if right else "WARNING: GENAI_FAST_ISA")
    assert all(len(line) <= 100 and line == line.rstrip() for line in (verdict, *lines))


def test_the_choice_of_a_backend_shows():
    with genai_fast.use_backend("reference"):
        served = doctor.examine()["ops"]["vae_loss"]["cpu"]
    assert served["backend"] == "reference" and set(served["not"]) == {"cpu", "triton"}


def test_it_works_without_extension_and_triton_and_says_so():
    environment = {**os.environ, "PYTHONPATH": str(Path(genai_fast.__file__).parents[1])}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", BARE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    served = report["ops"]["reparameterize"]["cpu"]
    assert served["backend"] == "reference"
    assert "C++ extension does not load" in served["not"]["cpu"]
    assert "triton is not installed" in served["not"]["triton"]
    assert report["cpu"]["in_use"] == "" and any("C++ extension" in w for w in report["warnings"])


def test_a_wrong_instruction_set_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "cpu_kernels", _refuse)
    report = doctor.examine()
    assert any("sve9" in w for w in report["warnings"]) and "sve9" in doctor.as_text(report)


def test_two_openmp_runtimes_are_warned_of(monkeypatch):
    assert len(doctor.examine()["openmp"]) <= 1  # ours maps torch's only
    monkeypatch.setattr(backends, "mapped_openmp", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    text = doctor.as_text(doctor.examine())
    assert "WARNING: 2 OpenMP runtimes" in text and "/b/libiomp5.so" in text and text.startswith("WARNING")


def test_caches_are_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "kernel").write_bytes(bytes(2**20))
    assert doctor.examine()["caches"]["triton"] == f"{tmp_path / 'triton'} (1 files, 1.0 MiB)"
    (autotune.folder() / "images" / "a").mkdir(parents=True)
    (autotune.folder() / "images" / "a" / "pixels.npy").write_bytes(bytes(2**20))
    assert doctor.examine()["caches"]["images"] == f"{autotune.folder() / 'images'} (1 files, 1.0 MiB)"
    assert set(doctor.examine()["caches"]) >= {"autotune", "tokens"}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "none"))
    assert "none yet" in doctor.examine()["caches"]["triton"]


def test_a_checkout_that_nobody_installed_has_a_version(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert f"genai_fast {genai_fast.__version__}" in autotune._machine.__wrapped__("cpu", 0, 1)
    assert machine.environment("cpu")["genai-fast"] == genai_fast.__version__
    assert environment(torch.device("cpu"))["genai_fast"] == genai_fast.__version__
    assert doctor.examine()["versions"]["triton"] == "not installed"
