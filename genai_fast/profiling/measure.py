"""The measurement: each variant warmed up and looked into by itself, then all clocked in turn."""

import contextlib
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from genai_fast.errors import UsageError
from genai_fast.profiling.compare import ForeignLoad
from genai_fast.profiling.counters import Energy, PeakMemory, page_faults
from genai_fast.profiling.flops import FlopCount
from genai_fast.profiling.loops import COMPILE, EAGER, FUSED, LoopEnded, Subject
from genai_fast.profiling.trace import Traced, trace
from genai_fast.profiling.waiting import Waiting

WARM_UP = 5  # steps: a captured graph replays by then
LOOKED_AT = 3  # steps whose memory is measured
TRACED = 4  # steps under the profiler
ROUNDS = 8  # turns that a variant has on the clock
LEAST = 2  # steps that are clocked in a turn
_ENERGY_SECONDS = 1.0  # the counter moves some ten times a second: nothing shorter is measured


@dataclass
class Measured:
    """A variant: what was measured of it, or why nothing was."""

    name: str
    failed: str = ""
    trace_back: str = ""
    first_step_seconds: float = math.nan
    memory: dict[str, int | None] = field(default_factory=dict)
    traced: Traced | None = None
    flops: FlopCount | None = None
    seconds: list[float] = field(default_factory=list)  # of each clocked step
    host: list[float] = field(default_factory=list)  # of those, until the step's call returned
    wall: float = 0.0  # of all turns
    steps: int = 0
    samples: int | None = None  # in the clocked steps
    waited: float = 0.0
    batches: int = 0  # waited for
    faults: int | None = 0
    joules: float | None = 0.0

    def fail(self, error: Exception) -> None:
        text = str(error).strip().splitlines()
        told = isinstance(error, (LoopEnded, UsageError))  # the message says all
        kind = "" if told else f"{type(error).__name__}: "
        self.failed = f"{kind}{text[0] if text else ''}".rstrip(": ")
        self.trace_back = "" if told else "".join(traceback.format_exception(error))


@dataclass
class Measurement:
    variants: list[Measured]
    cuda: bool
    flops: FlopCount | None  # of one eager step, which all variants are held to; None: each has its own
    others: float | None  # cores that other programs kept busy on the clock
    energy: str  # why it is unknown, "" if it is known
    ended: str = ""  # the loop's end, if it came on the clock


def measure(
    subject: Subject,
    variants: Sequence[str],
    seconds: float,
    device: torch.device | None,
    folder: Path,
    say: Callable[[str], None],
) -> Measurement:
    """Measure the variants; traces go to `folder`.

    Args:
        seconds: on the clock, for each variant.
        device: that the subject runs on; None: where its first step has put something.
        say: is told the progress.
    """
    found = [Measured(name) for name in variants]
    steps: dict[str, Callable[[], int | None]] = {}
    paces: dict[str, float] = {}
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    with subject.waiting.on_loaders():
        for variant in found:
            say(f"{variant.name}: warming up")
            try:
                torch.manual_seed(0)
                _compiled().clear()
                memory = {on_cuda: PeakMemory(on_cuda) for on_cuda in {False, cuda}}
                step = subject.make(variant.name)
                start = time.perf_counter()
                step()
                if device is None and cuda:
                    cuda = torch.cuda.memory_allocated() > 0
                _synchronize(cuda)
                variant.first_step_seconds = time.perf_counter() - start
                # Fused ops have their references counted, which need memory, only where eager is not there to count.
                variant.flops = None if variant.name == COMPILE else FlopCount(EAGER not in subject.variants)
                paces[variant.name] = _look_into(variant, step, memory[cuda], cuda, folder)
                steps[variant.name] = step
            except Exception as error:  # whatever the user's code or a compiler raises
                variant.fail(error)
        flops = _of_eager(subject, found)
        energy, load = Energy(cuda), ForeignLoad()
        running = [v for v in found if not v.failed]
        if running:
            say(f"measuring {', '.join(v.name for v in running)}: {seconds:g} s each")
        ended = _clock(subject, running, steps, paces, seconds, cuda, energy)
    for variant in running:
        if variant.steps < LEAST and not variant.failed:
            variant.failed = f"expected at least {LEAST} steps on the clock, got {variant.steps}: {ended[variant.name]}"
        if variant.joules is not None and variant.wall < _ENERGY_SECONDS:
            variant.joules = None
            energy.reason = energy.reason or f"energy: unknown in less than {_ENERGY_SECONDS:g} s; remedy: --seconds"
    return Measurement(found, cuda, flops, load.cores(), energy.reason, "; ".join(ended.values()))


def _look_into(variant: Measured, step: Callable[[], Any], memory: PeakMemory, cuda: bool, folder: Path) -> float:
    """Steps apart from the clock: FLOPs, memory, a trace; returns the seconds that a step takes, roughly."""
    # The second step: what is made once is made, and no graph is captured yet. But torch.compile stops compiling in a
    # process in which compiled code has run under a dispatch mode, as counting is one.
    if _compiled().get("unique_graphs"):
        variant.flops = None
    with variant.flops or contextlib.nullcontext():
        step()
    for _ in range(WARM_UP - 2):
        step()
    if variant.name == COMPILE and not _compiled().get("unique_graphs"):
        raise RuntimeError("torch.compile found nothing to compile in what `prepare` was called with")
    _synchronize(cuda)
    memory.reset()
    step()
    _synchronize(cuda)
    start = time.perf_counter()
    for _ in range(LOOKED_AT):
        step()
    _synchronize(cuda)
    pace = (time.perf_counter() - start) / LOOKED_AT
    variant.memory = memory.read()
    variant.traced = trace(step, TRACED, cuda, folder / f"trace-{variant.name}.json")
    return pace


def _compiled() -> dict[str, int]:
    """torch.compile's own statistics; empty if it has not been used yet."""
    used = sys.modules.get("torch._dynamo.utils")
    return {} if used is None else used.counters["stats"]


def _of_eager(subject: Subject, found: list[Measured]) -> FlopCount | None:
    """Operations of the model as it is written: a fused or compiled step may find a way with fewer."""
    if FUSED not in subject.variants or EAGER not in subject.variants:
        return None
    counted = next((v.flops for v in found if v.name == EAGER and v.flops is not None), None)
    if counted is not None:
        return counted
    with contextlib.suppress(Exception):  # where eager does not run, the others say why
        torch.manual_seed(0)
        _compiled().clear()
        step = subject.make(EAGER)
        step()
        if _compiled().get("unique_graphs"):
            return None
        with FlopCount() as counted:
            step()
        return counted
    return None


def _clock(
    subject: Subject, running: list[Measured], steps: dict[str, Callable[[], int | None]], paces: dict[str, float],
    seconds: float, cuda: bool, energy: Energy,
) -> dict[str, str]:  # fmt: skip
    """Turns of A B B A ...; returns by variant how its loop ended on the way."""
    ended: dict[str, str] = {}
    for turn in range(ROUNDS):
        for variant in running[:: -1 if turn % 2 else 1]:
            if variant.failed or variant.name in ended:
                continue
            count = max(LEAST, round(seconds / ROUNDS / paces[variant.name]))
            try:
                steps[variant.name]()  # the first after the others' finds cold caches
                _turn(subject.waiting, variant, steps[variant.name], count, cuda, energy)
            except LoopEnded as error:
                ended[variant.name] = f"{variant.name}: {error}"
            except Exception as error:
                variant.fail(error)
    return ended


def _turn(
    waiting: Waiting, variant: Measured, step: Callable[[], int | None], count: int, cuda: bool, energy: Energy
) -> None:
    """Steps on the clock; those before a loop's end count."""
    host: list[float] = []
    samples: list[int | None] = []
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)] if cuda else []
    waited, batches, faults = waiting.seconds, waiting.batches, page_faults()
    _synchronize(cuda)
    joules, start = energy.joules(), time.perf_counter()
    last, ended = start, None
    if cuda:
        ends[0].record()
    for k in range(count):
        try:
            found = step()
        except LoopEnded as error:
            ended = error
            break
        now = time.perf_counter()
        host.append(now - last)
        samples.append(found)
        last = now
        if cuda:
            ends[k + 1].record()
    _synchronize(cuda)
    variant.wall += time.perf_counter() - start
    variant.steps += len(host)
    variant.host += host
    # On a device a step ends when its last kernel has: waiting for each would take away the host's lead.
    pairs = itertools.pairwise(ends[: len(host) + 1])
    variant.seconds += [a.elapsed_time(b) / 1e3 for a, b in pairs] if cuda else host
    variant.waited += waiting.seconds - waited
    variant.batches += waiting.batches - batches
    variant.faults = None if faults is None else variant.faults + page_faults() - faults
    variant.joules = None if joules is None else variant.joules + energy.joules() - joules
    if samples and samples[0] is not None:
        variant.samples = (variant.samples or 0) + sum(samples)
    if ended is not None:
        raise ended


def _synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
