"""The stage "barrier": gru and lstm in one launch for all steps against one launch per step, on a GPU.

    python -m bench.gpu_gate.barrier

The numbers must be equal to the bit, repeatedly, and from a captured graph. Triton's interpreter passes no barrier, so
nothing else can tell. A barrier that fails may also wait forever: run it with a time limit, as the gate does before
everything else. Exit code: 0 right, 1 wrong, 2 nothing to check.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from bench import clock
from bench.gpu_gate import processes
from genai_fast.kernels.common.spec import Tensors
from genai_fast.kernels.recurrent import triton_kernel

NARROW, EXACT = torch.bfloat16, torch.float32
SIZES = ((128, 256, NARROW), (128, 512, NARROW), (37, 208, NARROW), (128, 256, EXACT))  # samples, hidden units
STEPS = 512
REPEATS = 5
LONGEST = 300.0  # seconds that the check may take

Call = Callable[[], list[torch.Tensor]]


def calls(device: str, steps: int = STEPS, sizes: tuple[Any, ...] = SIZES) -> Iterator[tuple[str, Call]]:
    """Forward and backward of both ops in these sizes, where forward (backward may be another matter) is one launch."""
    for batch, hidden, dtype in sizes:
        like = torch.empty(0, dtype=dtype, device=device)
        if not triton_kernel.planned(like, batch, hidden, False):
            continue
        for op, gates in (("gru", 3), ("lstm", 4)):
            t = Tensors(dtype, device)
            x, upstream = (t.normal(steps, batch, width, grad=False) for width in (gates * hidden, hidden))
            h, c = (t.normal(batch, hidden, scale=0.5, grad=False) for _ in range(2))
            weight = t.normal(gates * hidden, hidden, scale=hidden**-0.5, grad=False)
            name = f"{op} {steps}x{batch}x{hidden} {str(dtype).removeprefix('torch.')}"
            yield name, _gru(x, upstream, h, weight) if op == "gru" else _lstm(x, upstream, h, c, weight)


def _gru(x, upstream, h, weight) -> Call:
    def call() -> list[torch.Tensor]:
        y, last, saved = triton_kernel.gru(x, h, weight, None, True)
        return [y, last, saved, *triton_kernel.gru_backward(upstream, None, saved, y, h, weight)]

    return call


def _lstm(x, upstream, h, c, weight) -> Call:
    def call() -> list[torch.Tensor]:
        y, last, cell, saved = triton_kernel.lstm(x, h, c, weight, True)
        return [y, last, cell, saved, *triton_kernel.lstm_backward(upstream, None, None, saved, c, weight)]

    return call


def wrong(call: Call, repeats: int = REPEATS) -> str:
    """What is wrong with a call; "" if nothing."""
    with patch.object(triton_kernel, "steps_a_launch", lambda steps, grid: 1):
        expected = call()
    if not all(bool(torch.isfinite(x).all()) for x in expected):
        return "numbers that are not finite"
    for turn in range(repeats):
        if not all(map(torch.equal, call(), expected)):
            return f"run {turn} in one launch differs from one launch a step"
    if expected[0].is_cuda:
        replay, outputs = clock.capture(call)
        for turn in range(repeats):
            for x in outputs:
                x.fill_(-1.0)
            replay()
            if not all(map(torch.equal, outputs, expected)):
                return f"replay {turn} of the captured graph differs from one launch a step"
    return ""


def barrier_check(limit: float = LONGEST) -> dict[str, Any] | None:
    """This check in a process, which is killed if it waits forever; None: its time was cut short."""
    code, output = processes.call([sys.executable, "-m", "bench.gpu_gate.barrier"], min(limit, LONGEST))
    if code is None:
        return {"passed": False, "output": f"{output[-2000:]}no end after {LONGEST:g} s"} if limit >= LONGEST else None
    if code == 2:
        return {"skipped": output.strip()[-2000:] or "no layer fits in one launch here"}
    return {"passed": code == 0, "output": output[-2000:]}


def main() -> int:
    if not torch.cuda.is_available():
        print("barrier: torch sees no CUDA device; run it on a machine with a GPU")
        return 2
    checked = failed = 0
    for name, call in calls("cuda"):
        message = wrong(call)
        print(f"{name}: {message or 'right'}", flush=True)
        checked, failed = checked + 1, failed + bool(message)
    return 1 if failed else 0 if checked else 2


if __name__ == "__main__":
    sys.exit(main())
