"""Compiled kernels on the emulated GPU: in another process, since one in which Triton interprets cannot compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from genai_fast.kernels.common.extension import interpreting
from genai_fast.testing import emulated_gpu

ROOT = Path(__file__).resolve().parents[2]
PART = Path(__file__).with_name("compiled_kernels.py")

pytest.importorskip("triton")


@pytest.mark.parametrize("part", ["not every_kernel", "every_kernel and 80", "every_kernel and 90"])
def test_compiled(part):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", part, str(PART)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_an_interpreting_process_is_told():
    if not interpreting():
        pytest.skip("Triton compiles in this process")
    with (
        pytest.raises(ValueError, match="emulated_gpu: an interpreting process cannot compile; remedy: unset"),
        emulated_gpu(),
    ):
        pass
