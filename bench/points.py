"""What is measured: each op on each bench case, forward and backward, fused and as people write it."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench import clock, memory, roofs
from bench.variants import COMPILED, FUSED, ratios, ready, spreads, walls, warm
from genai_fast import ops, registry
from genai_fast.backends import choose
from genai_fast.kernels.common.spec import Case, OpSpec, Tensors
from genai_fast.profiling import ForeignLoad, compare
from genai_fast.testing import AUTOMATIC, Run, assert_matches_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16)}
ROUNDS = 11  # of interleaved clocking for one point, at least
SECONDS = {"cpu": 2.0, "cuda": 0.3}  # the same; on CUDA ratios are of device time, which has a clock of its own
QUICK = {"seconds": 0.4, "rounds": 5, "compiled": False}
INPUT_SETS = 4  # used in rotation on CUDA
UNCACHED = 1 << 27  # bytes of a tensor that is more than the caches of a GPU


@dataclass(frozen=True, eq=False)
class Point:
    """One op on one bench case, in one dtype, on one device."""

    op: OpSpec
    case: Case
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return f"{self.op}-{self.case}-{self.precision}-{self.device}"

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def variants(self) -> tuple[str, ...]:
        return (*self.peers, *([COMPILED] if self.op.compiled else []), FUSED)

    @property
    def peers(self) -> dict[str, Callable[..., Any]]:
        return self.op.peers | (self.op.gpu_peers if self.device == "cuda" else {})

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """On CUDA the same tensors each time, for all variants of the point; those of another point are let go."""
        if self.device != "cuda":
            return self._drawn(seed)
        if any(point is not self for point, _ in _kept):
            _kept.clear()
        if (self, seed) not in _kept:
            _kept[self, seed] = self._drawn(seed)
        return dict(_kept[self, seed])

    def _drawn(self, seed: int) -> dict[str, Any]:
        return self.case.inputs(drawing(self.dtype, self.device, torch.Generator().manual_seed(seed)))

    @property
    def input_sets(self) -> int:
        """Sets that are used in rotation; what no cache holds needs but one."""
        largest = max(x.nbytes for x in self.inputs().values() if isinstance(x, torch.Tensor))
        return INPUT_SETS if self.device == "cuda" and largest < UNCACHED else 1

    def function(self, variant: str) -> Callable[..., Any]:
        if variant == FUSED:
            return getattr(ops, self.op.name)
        return _compiled(self) if variant == COMPILED else self.peers[variant]

    def step(self, variant: str, seed: int = 0) -> Callable[[], Any]:
        """Forward, and backward from what the first peer returns (an op may return more), if it has one."""
        function, inputs = self.function(variant), self.inputs(seed)
        inputs = getattr(function, "prepare", dict)(inputs)  # a peer may want another memory layout
        leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        if not leaves:
            return lambda: function(**inputs)
        shared = len(_flat(next(iter(self.op.peers.values()))(**inputs)))

        def outputs() -> list[torch.Tensor]:  # those that have gradients: indices do not
            return [y for y in _flat(function(**inputs))[:shared] if y.requires_grad]

        upstream = [torch.randn_like(y) for y in outputs()]

        def forward_backward() -> Any:
            return torch.autograd.grad(outputs(), leaves, upstream)

        return forward_backward


_kept: dict[tuple[Point, int], dict[str, Any]] = {}  # of one point


@dataclass
class OnDevice(Tensors):
    """Draws where the tensors are wanted: one core of a host takes minutes for what a GPU draws in a moment.

    The numbers are others than the CPU's, and the same for the same generator.
    """

    def __post_init__(self) -> None:
        seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
        self._there = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, grad: bool = True) -> torch.Tensor:
        x = torch.randn(shape, generator=self._there, device=self.device)
        return self._finish(x.mul_(scale).add_(mean), grad)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, grad: bool = False) -> torch.Tensor:
        x = torch.rand(shape, generator=self._there, device=self.device)
        return self._finish(x.mul_(high - low).add_(low), grad)


def drawing(dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensors:
    """What makes the tensors that are measured."""
    return (OnDevice if device == "cuda" else Tensors)(dtype, device, generator)


@functools.cache
def _compiled(point: Point) -> Callable[..., Any]:
    torch.compiler.reset()  # a point is a new shape of the same code, and too many of those stop the compiler
    return torch.compile(next(iter(point.op.peers.values())), dynamic=False)


def _flat(outputs: Any) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def points(device: str) -> Iterator[Point]:
    """Every point that has a kernel for the device."""
    kernel = {"cpu": "cpu", "cuda": "triton"}[device]
    for op in registry.OPS.values():
        if not any(kernel in library.kernels for library in op.library):
            continue
        for case in (*op.bench_cases, *(op.gpu_cases if device == "cuda" else ())):
            for dtype in DTYPES[device]:
                if dtype in op.dtypes:
                    yield Point(op, case, dtype, device)


def fused_backend(op: OpSpec, device: str) -> str:
    """The backend that serves the op's fused variant, AUTOMATIC if none serves all of it."""
    backend = choose(op.library[0].name, "", device)[0]
    return backend if backend in op.backends else AUTOMATIC


def run_of(point: Point) -> Run:
    """The numerics gate's run of the fused op on this very case."""
    seeded = "seed" in inspect.signature(point.op.reference).parameters

    def inputs(t: Tensors) -> dict[str, Any]:
        drawn = point.case.inputs(drawing(t.dtype, point.device, t.generator))
        return {"seed": t.seed(5), **drawn} if seeded else drawn  # two draws compare only if they are the same

    case = dataclasses.replace(point.case, inputs=inputs)
    return Run(point.op, case, point.dtype, fused_backend(point.op, point.device), point.device)


def red(point: Point) -> str:
    """What the numerics gate has against the fused op on this very case; "" if it is green."""
    return wrong(run_of(point))


def wrong(run: Run) -> str:
    """What the numerics gate has against a run; "" if it is green."""
    try:
        assert_matches_reference(run)
    except AssertionError as error:
        return str(error)
    return ""


def figures(
    point: Point, seconds: float | None = None, *, rounds: int = ROUNDS, compiled: bool = True
) -> dict[str, Any]:
    """All figures of a point, variants interleaved; call only on a green gate.

    wall_us: median wall time of forward and backward. peak_bytes: what they hold at most. device_us (CUDA): median
    time on the device. ratio: each peer's time over the fused op's, device time where there is one; spread (CPU): its
    quartiles over the rounds. GB/s, GFLOP/s
    and share of the roof: of the fused op, from what its spec says it must move and do. `compiled=False` leaves
    torch.compile out, which may take a minute a point; `seconds`: SECONDS if None.
    """
    seconds = SECONDS[point.device] if seconds is None else seconds
    load = ForeignLoad()
    makers = {v: lambda v=v: warm(point.step(v)) for v in point.variants if compiled or v != COMPILED}
    steps, skipped = ready(makers, (COMPILED, *point.op.gpu_peers))
    found = compare(steps, rounds=rounds, seconds=seconds)
    best = {name: t.median for name, t in found.timings.items()}
    variants = walls(best)
    spread = {} if point.device == "cuda" else {"spread": spreads(found)}
    if point.device == "cuda":
        sets = {name: [point.step(name, seed) for seed in range(point.input_sets)] for name in steps}
        waiting = [name for name in steps if not getattr(point.function(name), "capturable", True)]
        timed = clock.device_times(sets, uncaptured=waiting)
        best = {name: t for name, (t, _) in timed.items()}
        for name, (t, how) in timed.items():
            variants[name].update(device_us=round(t * 1e6, 2), device_clock=how)
    for name in variants:
        variants[name]["peak_bytes"] = memory.peak_bytes(steps[name], point.device)
    cost, fused = point.op.cost(**point.inputs()), best[FUSED]
    return {
        "op": point.op.name,
        "case": point.case.name,
        "dtype": point.precision,
        "device": point.device,
        "backend": fused_backend(point.op, point.device),
        "variants": variants | skipped,
        "ratio": ratios(best),
        **spread,
        "gigabytes_per_second": round(cost.bytes / fused / 1e9, 2),
        "gigaflops_per_second": round(cost.flops / fused / 1e9, 2),
        "share_of_roof": round(roofs.share(point.device, fused, cost.bytes, cost.flops), 3),
        "foreign_load": load.cores(),
    }
