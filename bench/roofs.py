"""The measured roofs of this machine: how fast memory copies, and how fast matrices multiply.

python -m bench.roofs
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable

import torch

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # far beyond every cache
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


@functools.cache
def roofs(device: str) -> dict[str, float]:
    """bytes_per_second (read plus written, of a copy) and FLOP/s of GEMMs, measured once a process."""
    found = {"bytes_per_second": _copy(device), "float32": _gemm(device, torch.float32)}
    if device == "cuda":
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        found["tf32"] = _gemm(device, torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = before
        found["bfloat16"] = _gemm(device, torch.bfloat16)
        found["float16"] = _gemm(device, torch.float16)
    return found


def share(device: str, seconds: float, nbytes: int, flops: int) -> float:
    """The time that the nearer of the two roofs asks for, over the time that was taken.

    Both are those of float32: what an op accumulates in. More than 1 means that the data lay in a cache.
    """
    roof = roofs(device)
    return max(nbytes / roof["bytes_per_second"], flops / roof["float32"]) / seconds


def _fastest(call: Callable[[], object], device: str, repeats: int = 15) -> float:
    """Least wall time of a call, in seconds: a roof is what the machine can do, not what it usually does."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def _copy(device: str) -> float:
    source = torch.rand(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device] / _fastest(lambda: target.copy_(source), device)


def _gemm(device: str, dtype: torch.dtype) -> float:
    size = GEMM_SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    libraries = [lambda: a @ b]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        # oneDNN, which uses wider vectors than MKL does on some processors.
        libraries.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return max(2 * size**3 / _fastest(call, device) for call in libraries)


if __name__ == "__main__":
    print(json.dumps({d: roofs(d) for d in ("cpu", "cuda") if d == "cpu" or torch.cuda.is_available()}, indent=1))
