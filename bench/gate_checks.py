"""What the GPU gate checks in one process each, beside its tasks: the barrier between steps, and reads out of bounds.

    python -m bench.gate_checks

runs the small cases that the memory checker watches.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

import torch

from bench import isolated
from bench.checks import inputs_of, step_of, tensors
from genai_fast.testing import every_run

SMALL = 20_000  # elements of the largest input that the memory checker is given: it slows kernels a hundredfold
BARRIER, MEMORY = 300.0, 600.0  # seconds that each may take
LEAST = 60.0  # seconds below which the memory checker is not begun
_FINDINGS = 9  # the memory checker's exit code where it found something


def barrier_check(limit: float = BARRIER) -> dict[str, Any] | None:
    """bench.barrier, which is ended where it waits for ever; None: its time was cut short."""
    if limit <= 0:
        return None
    code, said = isolated.call([sys.executable, "-m", "bench.barrier"], min(limit, BARRIER))
    if code is None:
        return {"passed": False, "output": f"{said[-2000:]}no end after {BARRIER:g} s"} if limit >= BARRIER else None
    if code == 2:
        return {"skipped": said.strip()[-2000:] or "no layer fits in one launch here"}
    return {"passed": code == 0, "output": said[-2000:]}


def memory_check(limit: float = MEMORY) -> dict[str, Any]:
    """compute-sanitizer's memcheck on the small cases; it may be missing, or of no use on this device.

    {"skipped": why} where nothing was found out; with "again" where more time may help.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    if limit < LEAST:
        return {"skipped": f"{max(limit, 0.0):.0f} s were left, of {LEAST:g} that it wants at least", "again": True}
    limit = min(limit, MEMORY)
    command = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        str(_FINDINGS),
        sys.executable,
        "-m",
        "bench.gate_checks",
    ]
    # Out of a caching allocator's large blocks nothing looks out of bounds.
    code, said = isolated.call(command, limit, {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if code is None:
        return {
            "skipped": f"compute-sanitizer took more than {limit:.0f} s",
            **({"again": True} if limit < MEMORY else {}),
        }
    # Its own lines begin like this; what the cases print is another matter.
    unable = [line for line in said.splitlines() if line.startswith("====") and "not supported" in line]
    if unable or code not in (0, _FINDINGS):
        why = unable[0] if unable else f"it ended with {code}: {said.strip()[-600:]}"
        return {"skipped": f"compute-sanitizer cannot check here: {why}"}
    return {"passed": code == 0, "output": said[-2000:]}


def small_cases() -> None:
    """Each op's small cases in float32."""
    for run in every_run(("cuda",)):
        if run.backend != "triton" or run.dtype is not torch.float32:
            continue
        inputs = inputs_of(run)
        if max(x.numel() for x in tensors(inputs)) <= SMALL:
            step_of(run, inputs)()
    torch.cuda.synchronize()


if __name__ == "__main__":
    small_cases()
