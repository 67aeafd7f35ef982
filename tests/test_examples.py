"""The examples run, shortened, and say what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {
    "fuse_your_model.py": (("--epochs", "1"), ("together", "reparameterize", "nats a picture")),
    "own_training_loop.py": (("--steps", "2"), ("step 2: discriminator",)),
    "emulate_your_kernel.py": ((), ("warp instr", "out of bounds: read")),
}
PROFILED = "profile_your_loop.py"


def run(*arguments):
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name):
    if name == "emulate_your_kernel.py":
        pytest.importorskip("triton")
    arguments, said = EXAMPLES[name]
    out = run(ROOT / "examples" / name, *arguments)
    assert all(words in out for words in said), out


def test_the_profiled_example(tmp_path):
    loop = f"{ROOT / 'examples' / PROFILED}:train"
    out = run("-m", "genai_fast", "profile", loop, "--compare", "eager,fused", "--seconds", "0.3", "--out", tmp_path)
    assert "fused" in out


def test_every_example_is_short_and_run():
    files = {path.name: path.read_text().count("\n") for path in (ROOT / "examples").glob("*.py")}
    assert files.keys() == {*EXAMPLES, PROFILED}
    assert max(files.values()) <= 80
