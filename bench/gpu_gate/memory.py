"""The stage "memory": compute-sanitizer on each op's small cases.

    python -m bench.gpu_gate.memory

runs the cases, which the checker watches.
"""

import os
import shutil
import sys
from typing import Any

import torch

from bench.gpu_gate import processes
from bench.gpu_gate.runs import inputs_of, step_of, tensors
from genai_fast.testing import every_run

SMALL = 20_000  # elements of a case's largest input: the checker slows kernels a hundredfold
LONGEST, SHORTEST = 600.0, 60.0  # seconds that it may take; with less than the second it is not begun
_FINDINGS = 9  # the checker's exit code if it found something


def memory_check(limit: float = LONGEST) -> dict[str, Any]:
    """memcheck on the small cases, which may be missing or unable to run on this device.

    {"skipped": why} if nothing was learnt; with "again" if more time may help.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    if limit < SHORTEST:
        return {"skipped": f"{max(limit, 0.0):.0f} s were left, it needs at least {SHORTEST:g}", "again": True}
    limit = min(limit, LONGEST)
    flags = ["--tool", "memcheck", "--error-exitcode", str(_FINDINGS)]
    command = [tool, *flags, sys.executable, "-m", "bench.gpu_gate.memory"]
    # Inside a caching allocator's large blocks nothing looks out of bounds.
    code, output = processes.call(command, limit, {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if code is None:
        return {"skipped": f"compute-sanitizer took more than {limit:.0f} s", "again": limit < LONGEST}
    # Its own lines begin like this; what the cases print is another matter.
    unable = [line for line in output.splitlines() if line.startswith("====") and "not supported" in line]
    if unable or code not in (0, _FINDINGS):
        why = unable[0] if unable else f"it ended with {code}: {output.strip()[-600:]}"
        return {"skipped": f"compute-sanitizer cannot check here: {why}"}
    return {"passed": code == 0, "output": output[-2000:]}


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
