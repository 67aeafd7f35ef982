"""Times predicted from an emulated GPU's counters: which resource limits a kernel, and for how long.

Called by `python -m bench.emulate --roofs`. A prediction is the largest of the times that each resource takes at its
peak, and a launch's own. It knows no latency, occupancy or tail; L1 holds what a program has read once, and L2 nothing;
SASS is guessed from PTX (moves are free, 64-bit integers take several). None has been compared with a GPU.

Compared with Liger: the same cases, where liger-kernel has the op, in the same emulator (bench.liger).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from bench.launches import call
from genai_fast import use_backend
from genai_fast.emulator.devices import DEVICES, Device
from genai_fast.emulator.driver_triton import EmulatedGPU
from genai_fast.emulator.findings import KernelFault
from genai_fast.emulator.record import Record
from genai_fast.errors import UsageError
from genai_fast.kernels.common.spec import Case, OpSpec, Tensors

# B200: of its L2 no figure is published, and the clock is that of its peak (8192 operations a clock).
_B200 = dict(multiprocessors=148, clock=1.86e9, dram=8e12, l2=float("inf"), flops=2250e12)
MACHINES = {
    "A100": DEVICES[80],
    "H100": DEVICES[90],
    "H200": replace(DEVICES[90], name="H200", dram=4.8e12),
    "B200": replace(DEVICES[90], name="B200", **_B200),
}
CODE = {80: ("A100",), 90: ("H100", "H200", "B200")}  # compiled for -> the machines whose counters it gives
SHARES = ("H100", "H200")  # of which the page says the share of the roof
LIGER = "H200"  # on which Liger's kernels are compared
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
    at_peak = machine is MACHINES["A100"] or any(s.name.startswith("wgmma") for s in r.statements)
    flops = machine.flops * (1.0 if at_peak else OF_PEAK) * used / machine.multiprocessors
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


@dataclass(frozen=True)
class Figures:
    """Of one case: forward and backward in bfloat16, in code for one architecture."""

    launches: int
    warp_instructions: int
    bytes: int  # distinct ones of each launch
    predictions: dict[str, list[Prediction]]  # by machine, of each launch
    left_to_pytorch: tuple[int, ...] = ()  # bytes that each of its kernels moves, at least

    def seconds(self, machine: str) -> float:
        return sum(p.total for p in self.predictions[machine])


def figures(gpu: EmulatedGPU, run: Callable[[], object]) -> Figures | None:
    """Of what it launches on the GPU, which has been entered; None if that takes more instructions than BUDGET."""
    gpu.records.clear()
    try:
        run()
    except KernelFault as error:
        if "warp instructions in one launch" not in str(error):
            raise
        return None
    predictions = {name: [predict(r, MACHINES[name]) for r in gpu.records] for name in CODE[gpu.arch]}
    moved = sum(sum(r.footprint) for r in gpu.records)
    return Figures(len(gpu.records), sum(r.warp_instructions for r in gpu.records), moved, predictions)


def ours(op: OpSpec, case: Case, gpu: EmulatedGPU) -> Figures | None:
    """Of one case through our kernels."""
    with use_backend("triton"):
        return figures(gpu, lambda: call(op, case.inputs(Tensors(torch.bfloat16))))


def ligers(op: OpSpec, case: Case, gpu: EmulatedGPU) -> Figures | None:
    """Of one case through Liger's; None if it has no such op or option."""
    try:
        from bench import liger
    except ModuleNotFoundError as error:
        raise UsageError(f"predicted times: {error.name} is not installed; remedy: pip install liger-kernel") from error
    inputs = case.inputs(Tensors(torch.bfloat16))
    if not liger.serves(op.name, inputs):
        return None
    with liger.LeftToPyTorch() as left:
        found = figures(gpu, lambda: liger.call(op.name, inputs, gpu.device.multiprocessors))
    # Of rotary: halves of x taken apart and put together, which queries and keys are not.
    return found and replace(found, left_to_pytorch=() if op.name == "rotary" else tuple(left.bytes))


def row(op: OpSpec, case: Case, by_arch: dict[int, Figures | None]) -> list[str]:
    """A line of the table."""
    if None in by_arch.values():
        return [op.name, case.name, "more than is emulated", *[""] * (len(_heads()) - 3)]
    found = {machine: by_arch[arch] for arch, machines in CODE.items() for machine in machines}
    cost = op.cost(**case.inputs(Tensors(torch.bfloat16)))
    cells = [op.name, case.name, f"{found[LIGER].launches}"]
    for name, machine in MACHINES.items():
        seconds = found[name].seconds(name)
        cells.append(f"{1e6 * seconds:.1f}")
        if name in SHARES:
            roof = max(cost.bytes / machine.dram, cost.flops / machine.flops)
            cells.append(f"{roof / seconds:.0%}" if roof < seconds else "-")
    longest = max(found[LIGER].predictions[LIGER], key=lambda p: p.total)
    return [*cells, f"{longest.kernel.lstrip('_')}, {1e6 * (longest.total - LAUNCH):.1f}", longest.limiter]


def beside(op: OpSpec, case: Case, mine: Figures, other: Figures) -> list[str]:
    """A line of the table that compares: ours / Liger's, and its with what it leaves to PyTorch."""
    pairs = [(f.launches, f"{f.warp_instructions / 1e6:.2f}", f"{f.bytes / 1e6:.1f}", f"{1e6 * f.seconds(LIGER):.1f}")
             for f in (mine, other)]  # fmt: skip
    left = other.left_to_pytorch
    whole = other.seconds(LIGER) + sum(left) / MACHINES[LIGER].dram + LAUNCH * len(left)
    more = f"{len(left)}, {sum(left) / 1e6:.1f} MB"
    return [op.name, case.name, *(f"{a} / {b}" for a, b in zip(*pairs, strict=True)), more, f"{1e6 * whole:.1f}"]


_COMPARED = ["op", "case", "launches", "million warp instructions", "MB", f"us on {LIGER}",
             "left to PyTorch: kernels", f"us of Liger with them on {LIGER}"]  # fmt: skip


def _heads() -> list[str]:
    heads = ["op", "case", "launches"]
    for machine in MACHINES:
        heads += [f"{machine}, us", *(["of the roof"] if machine in SHARES else [])]
    return [*heads, f"longest kernel, us on {LIGER}", "limited by"]


def _table(heads: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def page(rows: Iterable[list[str]], compared: Iterable[list[str]]) -> str:
    """The Markdown page."""
    lines = [
        "# Predicted, not measured",
        "",
        "Forward and backward of each op's bench cases in bfloat16, from the counters of compiled kernels that ran on",
        "emulated GPUs: `python -m bench.emulate --roofs`. A kernel takes what the busiest resource takes",
        f"at its peak, and {1e6 * LAUNCH:g} us for its launch. The roof is the time that the op's least bytes or",
        "operations take at the data sheet's peak. Nothing here was compared with a GPU: latency, occupancy, the tail",
        "of a grid, what the L2 holds and what ptxas makes of the PTX are not in it, nor are products that an op",
        "leaves to PyTorch (linear_cross_entropy's; no share then). The code is that of sm_80 for A100 and of sm_90",
        "for the others: a B200 would run other matrix instructions, and nothing is known of its L2.",
        "",
        *_table(_heads(), rows),
        "",
        "## Compared with Liger",
        "",
        "The same cases through the kernels of Liger, in the same emulator: ours / Liger's. MB are the distinct bytes",
        "that each launch reads and writes. Ours is the whole op; Liger leaves parts to PyTorch (layer_norm's sum with",
        "the residual and of their gradients, the bias before the activation and its gradient, sums of partial",
        "gradients, copies), which the last columns add at the peak of the memory, a launch each. Its GEGLU is the",
        "approximation with tanh; it turns no interleaved pairs. Its cross-entropy writes the gradient over the logits",
        "in forward, which is wrong wherever anything else reads them, and so never reads them a second time: of a",
        "vocabulary of 128256 ours moves half as much again.",
        "",
        *_table(_COMPARED, compared),
    ]
    return "\n".join(lines) + "\n"
