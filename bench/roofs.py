"""The measured roofs of this machine: how fast memory copies, and how fast matrices multiply.

python -m bench.roofs
"""

import functools
import json

import torch

from genai_fast.profiling.machine import fastest, gemm

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # far beyond every cache


@functools.cache
def roofs(device: str) -> dict[str, float]:
    """bytes_per_second (read plus written, of a copy) and FLOP/s of GEMMs, measured once a process."""
    precisions = ("float32",) if device == "cpu" else ("float32", "tf32", "bfloat16", "float16")
    return {"bytes_per_second": _copy(device), **{name: gemm(device, name) for name in precisions}}


def share(device: str, seconds: float, nbytes: int, flops: int) -> float:
    """The time that the nearer of the two roofs asks for, over the time that was taken.

    Both are those of float32: what an op accumulates in. More than 1 means that the data lay in a cache.
    """
    roof = roofs(device)
    return max(nbytes / roof["bytes_per_second"], flops / roof["float32"]) / seconds


def _copy(device: str) -> float:
    source = torch.rand(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device] / fastest(lambda: target.copy_(source), device)


if __name__ == "__main__":
    print(json.dumps({d: roofs(d) for d in ("cpu", "cuda") if d == "cpu" or torch.cuda.is_available()}, indent=1))
