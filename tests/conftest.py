"""Triton kernels run in the interpreter where there is no GPU; it must be asked for before they are imported."""

import os

import pytest
import torch
from alike import norm_calls

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure():
    """Triton's interpreter replaces its whole language anew for each call from a kernel: half of its time, in vain."""
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    run, replace, replaced = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def run_one(self, *args, **kwargs):
        replaced.clear()
        return run(self, *args, **kwargs)

    def replace_once(function):
        seen = frozenset(id(x) for x in function.__globals__.values() if x is language or x is language.core)
        if seen in replaced:
            return interpreter._LangPatchScope()
        replaced.add(seen)
        return replace(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = run_one, replace_once


@pytest.fixture
def fused_calls():
    """The activations that fused batch norms were called with, measurements apart."""
    with norm_calls() as made:
        yield made


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(monkeypatch, tmp_path_factory):
    """The user's stays as it is."""
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def small_is_fused():
    """For a small test of what runs on large tensors: outside it, thresholds are those that users have."""
    from genai_fast.fusion import thresholds

    with thresholds.ignored():
        yield


@pytest.fixture
def pinned(monkeypatch):
    """For a test of bits: every choice is its default."""
    monkeypatch.setenv("GENAI_FAST_DETERMINISTIC", "1")


@pytest.fixture
def quick(monkeypatch):
    """Roofs that need no measuring, and a compiler that fails."""
    from bench import roofs

    monkeypatch.setattr(roofs, "roofs", lambda device: {"bytes_per_second": 1e10, "float32": 1e11})

    def fail(*arguments, **settings):
        raise RuntimeError("no compiler\nand more lines")

    monkeypatch.setattr(torch, "compile", fail)


@pytest.fixture
def one_thread():
    """For small tensors, at which threads would wait for each other; and for forks, which have no other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
