"""Plans of GPU calls: in another process, since one in which Triton interprets cannot compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent

pytest.importorskip("triton")


def test_plans():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, str(FOLDER / "compiled_plans.py")],
        cwd=FOLDER.parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
