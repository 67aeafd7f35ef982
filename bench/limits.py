"""What each op's launches take on an emulated GPU, against the limits in its spec (OpSpec.limits).

Called by `python -m bench.emulate --limits`: forward and backward of one case in bfloat16, compiled for sm_90. Counters
depend on the compiled code alone, so a limit may lie a few percent above what is found.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.launches import call
from genai_fast import use_backend
from genai_fast.emulator.driver_triton import EmulatedGPU
from genai_fast.emulator.record import Record
from genai_fast.kernels.common.spec import OpSpec, Tensors

ARCH = 90
REMEDY = "remedy: fix the kernel, or raise the limit in the op's spec"


def launches(op: OpSpec, gpu: EmulatedGPU) -> tuple[list[Record], int]:
    """Of the case of the op's limits, and the elements of its largest tensor; the GPU has been entered."""
    assert op.limits is not None
    inputs = op.limits.inputs(Tensors(torch.bfloat16))
    gpu.records.clear()
    with use_backend("triton"):
        call(op, inputs)
    return list(gpu.records), max(x.numel() for x in inputs.values() if isinstance(x, torch.Tensor))


def violations(op: OpSpec, records: list[Record], elements: int) -> Iterator[str]:
    """What passes a limit: op, kernel, limit and what was found."""
    limits = op.limits
    assert limits is not None
    if len(records) != len(limits.instructions):
        names = ", ".join(r.kernel for r in records) or "none"
        yield f"{op}: launches: expected {len(limits.instructions)}, got {len(records)} ({names}); {REMEDY}"
        return
    for k, (r, most) in enumerate(zip(records, limits.instructions, strict=True)):
        for what, found, limit in (
            ("instructions of threads an element", instructions(r, elements), most),
            ("sectors over the ideal number", r.sector_ratio, limits.sectors),
            ("wavefronts of shared memory over those without conflicts", r.conflict_ratio, limits.conflicts),
        ):
            if found > limit:
                where = f"{op}: {r.kernel} (launch {k + 1} of {len(records)})"
                yield f"{where}: {what}: expected at most {limit:g}, got {found:.4g}; {REMEDY}"


def instructions(r: Record, elements: int) -> float:
    """That the threads of a launch execute, for each element."""
    return int(r.counts[:, 1].sum()) / elements


def row(op: OpSpec, records: list[Record], elements: int) -> str:
    """What was found, as the spec has it."""
    each = ", ".join(f"{instructions(r, elements):.4g}" for r in records)
    worst = (f"{max(getattr(r, ratio) for r in records):.2f}" for ratio in ("sector_ratio", "conflict_ratio"))
    return f"{op}: ({each}), {', '.join(worst)}"
