"""Compiled kernels on the emulated GPU: in another process, since one in which Triton interprets cannot compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from genai_fast.kernels.common.extension import interpreting
from genai_fast.testing import emulated_gpu

FOLDER = Path(__file__).resolve().parent

pytest.importorskip("triton")


def assert_all_pass(name, *more):
    """Each test of a file passes, and none is left out."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(FOLDER / name),
        *more,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("part", ["not every_kernel", "every_kernel and 90"])
def test_compiled(part):
    """`python -m bench.emulate` runs all cases, on both architectures."""
    assert_all_pass("compiled_kernels.py", "-k", part)


def test_kernels_of_others():
    pytest.importorskip("liger_kernel")
    assert_all_pass("liger_kernels.py")


def test_an_interpreting_process_is_told():
    if not interpreting():
        pytest.skip("Triton compiles in this process")
    told = "emulated_gpu: an interpreting process cannot compile; remedy: unset"
    with pytest.raises(ValueError, match=told), emulated_gpu():
        pass
