"""Times predicted from an emulated GPU's counters: which resource limits a kernel, and for how long.

Called by `python -m bench.emulate --roofs`. A prediction is the largest of the times that each resource takes at its
peak, and a launch's own. It knows no latency, occupancy or tail; L1 holds what a program has read once, and L2 nothing;
SASS is guessed from PTX (moves are free, 64-bit integers take several). None has been compared with a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.launches import call
from genai_fast import use_backend
from genai_fast.emulator.devices import DEVICES, Device
from genai_fast.emulator.driver_triton import EmulatedGPU
from genai_fast.emulator.findings import KernelFault
from genai_fast.emulator.record import Record
from genai_fast.kernels.common.spec import Case, OpSpec, Tensors

MACHINES = {"H100": DEVICES[90], "H200": replace(DEVICES[90], name="H200", dram=4.8e12)}
ARCH = 90  # that is emulated: of all MACHINES
LAUNCH = 2e-6  # seconds between one kernel and the next
OF_PEAK = 0.62  # of dense matrices that mma.sync reaches on Hopper; wgmma comes near the peak
SCHEDULERS, SPECIAL_FUNCTIONS, L1_SECTORS = 4, 16, 4  # of a multiprocessor, each clock
BUDGET = 300_000_000  # warp instructions of a launch, beyond which a case is left out


def issue_slots(name: str) -> float:
    """About how many SASS instructions a PTX instruction becomes."""
    parts = name.split(".")
    op, kind = parts[0], parts[-1]
    if op in ("mov", "cvta") or "param" in parts:
        return 0.0
    if op == "div":
        return 8.0 if "full" in parts else 14.0 if kind == "f32" else 70.0 if kind.endswith("64") else 24.0
    if op == "rem":
        return 26.0
    if op in ("sqrt", "rcp") and "rn" in parts:
        return 10.0
    if kind in ("s64", "u64", "b64"):
        return 4.0 if "lo" in parts else 2.0
    return 1.0


@dataclass(frozen=True)
class Prediction:
    """Of one launch: seconds that each resource takes."""

    kernel: str
    seconds: dict[str, float]

    @property
    def limiter(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def total(self) -> float:
        return self.seconds[self.limiter] + LAUNCH


def predict(r: Record, machine: Device) -> Prediction:
    """What a launch takes on a machine."""
    used = min(machine.multiprocessors, r.programs)
    clocks = used * machine.clock
    slots = sum(issue_slots(s.name) * int(row[0]) for s, row in zip(r.statements, r.counts, strict=True))
    wgmma = any(s.name.startswith("wgmma") for s in r.statements)
    flops = machine.flops * (1.0 if wgmma else OF_PEAK) * used / machine.multiprocessors
    work = sum(n * (2 if kind == "tf32" else 1) for kind, n in r.flops().items())
    return Prediction(r.kernel, {
        "memory": sum(r.footprint) / machine.dram,
        "L2": 32 * (r.block_sectors + r.store_sectors) / machine.l2,
        "L1": r.load_sectors / (L1_SECTORS * clocks),
        "instructions": slots / (SCHEDULERS * clocks),
        "shared memory": r.total("wavefronts", "shared load", "shared store") / clocks,
        "special functions": r.total("lanes", "special function") / (SPECIAL_FUNCTIONS * clocks),
        "matrix products": work / flops,
    })  # fmt: skip


def row(op: OpSpec, case: Case, gpu: EmulatedGPU) -> list[str]:
    """A line of the table: forward and backward in bfloat16."""
    gpu.records.clear()
    inputs: dict[str, Any] = case.inputs(Tensors(torch.bfloat16))
    cost = op.cost(**inputs)
    try:
        with use_backend("triton"):
            call(op, inputs)
    except KernelFault as error:
        if "warp instructions in one launch" not in str(error):
            raise
        return [op.name, case.name, "more than is emulated", *[""] * (2 + 2 * len(MACHINES))]
    cells = []
    for machine in MACHINES.values():
        found = [predict(r, machine) for r in gpu.records]
        total = sum(p.total for p in found)
        roof = max(cost.bytes / machine.dram, cost.flops / machine.flops)
        cells += [f"{1e6 * total:.1f}", f"{roof / total:.0%}" if roof < total else "-"]
        longest = max(found, key=lambda p: p.total)
    name = f"{longest.kernel.lstrip('_')}, {1e6 * (longest.total - LAUNCH):.1f}"
    return [op.name, case.name, f"{len(gpu.records)}", *cells, name, longest.limiter]


def page(rows: Iterable[list[str]]) -> str:
    """The Markdown page."""
    heads = ["op", "case", "launches"]
    for machine in MACHINES:
        heads += [f"{machine}, us", "of the roof"]
    heads += [f"longest kernel, us on {list(MACHINES)[-1]}", "limited by"]
    lines = [
        "# Predicted, not measured",
        "",
        "Forward and backward of each op's bench cases in bfloat16, from the counters of compiled kernels that ran on",
        f"an emulated sm_{ARCH}: `python -m bench.emulate --roofs`. A kernel takes what the busiest resource takes",
        f"at its peak, and {1e6 * LAUNCH:g} us for its launch. The roof is the time that the op's least bytes or",
        "operations take at the data sheet's peak. Nothing here was compared with a GPU: latency, occupancy, the tail",
        "of a grid, what the L2 holds and what ptxas makes of the PTX are not in it, nor are products that an op",
        "leaves to PyTorch (linear_cross_entropy's; no share then).",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"
