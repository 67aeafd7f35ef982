"""The stage "training": whole training steps, fused beside the plain script, as it is and as people speed it up.

Losses are compared first: if they differ there are no figures. All variants share one process and are timed in turn.
A peer that cannot run is skipped, with the reason in the figure; the fused step must run.
"""

import contextlib
import functools
import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.gpu_gate import parity
from bench.variants import in_turn, ratios, ready, walls
from genai_fast import autotune
from genai_fast.errors import UsageError
from genai_fast.models.registry import RECIPES
from genai_fast.profiling import ForeignLoad, compare
from genai_fast.profiling.counters import Energy, PeakMemory
from genai_fast.profiling.figures import roof
from genai_fast.profiling.flops import FlopCount
from genai_fast.profiling.loops import COMPILE, EAGER, FUSED, preparing
from genai_fast.profiling.systems import GPU_SYSTEMS, SYSTEMS, Prepare, System, as_it_is
from genai_fast.profiling.trace import trace

UNROLLED = tuple(name for name, recipe in RECIPES.items() if recipe.unrolled)  # compilation takes many minutes
REDUCED = "compile reduce-overhead"
WARM_UP = 6  # steps: by then a Step replays its graph, and so does what torch.compile made
ROUNDS, SECONDS = 15, 2.0  # of interleaved clocking, at least
QUEUED, QUEUES = 5, 7  # steps back to back between two events, and how often
TRACED = 4  # steps under the profiler
ENERGY_SECONDS = 2.0  # the counter moves some ten times a second
DRIFT = 10  # tolerances by which losses behind the first step's may differ: of themselves, or the first if it is more
SILENT = 600.0  # seconds that a variant may take to compile

_FIRST = (
    "mlp_vae", "mlp_gan", "dcgan_64_batch128", "dcgan_64_bfloat16_batch128", "gpt2_bfloat16", "gpt_nano",
    "conv_vae_64", "lstm",
)  # fmt: skip
_KNOWN = SYSTEMS | GPU_SYSTEMS
MEASURED = {name: _KNOWN[name] for name in (*_FIRST, *(name for name in _KNOWN if name not in _FIRST))}

Call = Callable[[], Any]


def parity_of(name: str) -> str | None:
    """The system whose fifty steps of bench.parity speak for this one's: of the same recipe; None: none do."""
    recipe = MEASURED[name].recipe
    return next((other for other in parity.TOLERANCE if SYSTEMS[other].recipe == recipe), None)


def red(system: System, device: str, steps: int = 1) -> str:
    """Why the plain and the fused step do not compute the same; "" if they do (noise and dropout differ, by little)."""
    batch, curves = system.inputs(device), []
    with parity.multiplying_in_full(system, device, batch):
        for make, scale in ((system.plain, system.plain_scale), (system.fused, 1)):
            torch.manual_seed(0)
            step = make(device)
            curves.append([_losses(step(*batch)) / scale for _ in range(steps)])
    first = curves[0][0].abs()
    for number, (plain, fused) in enumerate(zip(*curves, strict=True), 1):
        fused = fused[: len(plain)]  # those that the plain script has
        limit = system.tolerance * plain.abs().maximum(first) * (1 if number == 1 else DRIFT)
        if not ((plain - fused).abs() <= limit).all():  # nor is NaN within
            return f"losses of step {number}: expected about {plain.tolist()}, got {fused.tolist()}"
    return ""


def _losses(said: Any) -> torch.Tensor:
    return torch.stack([loss.float() for loss in (said if isinstance(said, tuple) else (said,))])


def variants(system: System, device: str, compiled: bool = True) -> dict[str, Callable[[], Call]]:
    """name -> what makes the step, as one call on a batch that stays the same.

    The fused one is the first: peers take what memory is left. torch.compile's have its precision.
    """
    narrow = system.config.precision == "bfloat16"

    def plain(prepare: Prepare, layout: torch.memory_format = torch.preserve_format) -> Call:
        batch = [x.to(memory_format=layout) if x.dim() == 4 else x for x in system.inputs(device)]
        return functools.partial(system.plain(device, prepare), *batch)

    def channels_last(model: nn.Module, method: str = "forward") -> nn.Module:
        return preparing(EAGER, bf16=True)(model.to(memory_format=torch.channels_last), method)

    def reduced() -> Call:
        step = plain(preparing(COMPILE, bf16=narrow, mode="reduce-overhead"))

        def marked() -> Any:  # networks in turns are several graphs a step: say where the next step begins
            torch.compiler.cudagraph_mark_step_begin()
            return step()

        return marked

    found: dict[str, Callable[[], Call]] = {
        FUSED: lambda: functools.partial(system.fused(device), *system.inputs(device)),
        EAGER: lambda: plain(as_it_is),
    }
    if system.is_text:
        found[autocast_of(system)] = lambda: plain(preparing(EAGER, bf16=True))
    else:
        found[autocast_of(system)] = lambda: plain(channels_last, torch.channels_last)
    if compiled and system.recipe not in UNROLLED:
        found[COMPILE] = lambda: plain(preparing(COMPILE, bf16=narrow))
        found[REDUCED] = reduced
    return found


def autocast_of(system: System) -> str:
    """The name of plain eager in bfloat16, with the layout that people give it."""
    return "eager autocast" if system.is_text else "eager channels_last autocast"


def warmed(make: Callable[[], Call], device: str) -> tuple[Call, dict[str, Any]]:
    """The step, compiled and captured by now, and the most memory held on the way, weights and all.

    Not in a later step: what a captured graph uses counts as free when it is replayed.
    """
    gc.collect()
    memory = PeakMemory(device == "cuda")
    memory.reset()
    torch.manual_seed(0)
    step = make()
    for _ in range(WARM_UP):
        step()
    wait(device)
    found = memory.read()
    peak = found["peak_allocated_bytes" if device == "cuda" else "peak_resident_growth_bytes"]
    return step, {} if peak is None else {"peak_bytes": peak}


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Raises where torch.compile leaves code as it is: it would do so without a word."""
    made = torch._dynamo.utils.counters["stats"]
    before = made["unique_graphs"]
    # Variants share code, which is compiled for each of them: more often than the limit allows.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield
    if made["unique_graphs"] == before:
        raise RuntimeError("torch.compile found nothing to compile")


def figures(
    name: str, device: str, rounds: int = ROUNDS, batch: int | None = None, compiled: bool = True
) -> dict[str, Any]:
    """All figures of a system.

    wall_us: median of a step and the wait for its end. device_us (CUDA): median of a step among others queued back to
    back, by events: the longer of what the host and the device take. peak_bytes: as `warmed` says. captured: whether
    the fused step is a graph. ratio, samples_per_second, tokens_per_second and mfu: by wall_us, of the fused step; mfu:
    FLOP/s of the plain script's products over what the machine's own reach in their precision. paths: of each
    convolution of the fused step, and the times that it was chosen by.

    Args:
        batch: samples a step; None: as the system has it.
        compiled: False leaves torch.compile out.
    """
    system = _system(name, batch)
    case = "x".join(map(str, (system.batch, *system.shape)))
    head = {"system": name, "case": case, "dtype": system.config.precision, "device": device, "batch": system.batch}
    say(name, "losses")
    if message := red(system, device, WARM_UP):
        return {**head, "failures": {"numerics": message}}
    load, makers = ForeignLoad(), variants(system, device, compiled)

    def prepared(variant: str, make: Callable[[], Call]) -> tuple[Call, dict[str, Any]]:
        say(name, variant)
        with _compiling() if variant in (COMPILE, REDUCED) else contextlib.nullcontext():
            return warmed(make, device)

    peers = [variant for variant in makers if variant != FUSED]
    made, skipped = ready({v: functools.partial(prepared, v, make) for v, make in makers.items()}, peers)
    steps = {variant: step for variant, (step, _) in made.items()}
    say(name, "figures")
    times = {n: t.median for n, t in compare(steps, rounds=rounds, seconds=SECONDS).timings.items()}
    found = {variant: made[variant][1] | wall for variant, wall in walls(times).items()} | skipped
    counted = _count(steps, autocast_of(system) if system.config.precision == "bfloat16" else EAGER)
    energy = Energy(device == "cuda")
    if device == "cuda":
        _on_device(steps, found, energy)
    fused, tokens = times[FUSED], system.shape[0] if system.is_text else 0
    return {
        **head,
        "variants": {variant: found[variant] for variant in (*peers, FUSED)},
        "ratio": ratios(times),
        "samples_per_second": round(system.batch / fused, 1),
        **({"tokens_per_second": round(system.batch * tokens / fused, 1)} if tokens else {}),
        **(_utilisation(counted, fused, device) if counted is not None else {}),
        **({"energy": energy.reason} if device == "cuda" and energy.reason else {}),
        "paths": {key: choice._asdict() for key, choice in autotune.chosen(torch.device(device)).items()},
        "foreign_load": load.cores(),
    }


def _system(name: str, batch: int | None) -> System:
    if name not in MEASURED:
        raise UsageError(f"{name}: expected one of {', '.join(MEASURED)}")
    return MEASURED[name] if batch is None else replace(MEASURED[name], batch=batch)


def _count(steps: Mapping[str, Call], written: str) -> FlopCount | None:
    """Operations of the plain script; None where it does not run."""
    if written not in steps:
        return None
    with FlopCount() as count:
        steps[written]()
    return count if count.total else None


def _utilisation(count: FlopCount, seconds: float, device: str) -> dict[str, Any]:
    reach = roof(device, count)
    found: dict[str, Any] = {"model_flops": count.total}
    if count.unknown:
        found["flops_not_counted"] = sorted(count.unknown)
    if reach is not None:
        rate = count.total / seconds
        found |= {"mfu": round(rate / reach["flops_per_second"], 4), "mfu_precision": reach["precision"]}
    return found


def _on_device(steps: Mapping[str, Call], found: dict[str, dict[str, Any]], energy: Energy) -> None:
    """What only a GPU tells, into `found`; the profiler last, which may slow down what follows it."""
    for name, seconds in queued_times(steps).items():
        found[name]["device_us"] = round(seconds * 1e6, 2)
    for name, step in steps.items():
        joules = joules_of(step, found[name]["device_us"] / 1e6, energy)
        if joules is not None:
            found[name]["joules_per_step"] = float(f"{joules:.4g}")
    found[FUSED]["captured"] = steps[FUSED].func.captured > 0
    with tempfile.TemporaryDirectory() as folder:
        for name, step in steps.items():
            traced = trace(step, TRACED, True, Path(folder) / "trace.json")
            if traced.kernels:  # none where the profiler may not look
                found[name]["launches"] = traced.launches


def queued_times(steps: Mapping[str, Call]) -> dict[str, float]:
    """Median seconds of a step, by CUDA events around QUEUED of them back to back, in turn (A B B A ...)."""

    def clock(step: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()  # no step overlaps another variant's
        start.record()
        for _ in range(QUEUED):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / QUEUED / 1e3

    return in_turn(clock, steps, QUEUES)


def joules_of(step: Call, seconds: float, energy: Energy) -> float | None:
    """Of the whole device, for one step of about that many seconds; None if it is unknown."""
    count = math.ceil(ENERGY_SECONDS / seconds)
    wait("cuda")
    before = energy.joules()
    if before is None:
        return None
    for _ in range(count):
        step()
    wait("cuda")
    return (energy.joules() - before) / count


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def say(name: str, what: str) -> None:
    """A sign of life: the parent process gives up when none comes."""
    print(f"{name}: {what}", flush=True)


work = figures
