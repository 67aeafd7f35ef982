"""Whether faults are noticed: compiled kernels on the emulated GPU with one executed instruction changed.

Called by `python -m bench.emulate --mutate`. A change is noticed by a fault, by a warning, or by wrong numbers.
Changes that change nothing are counted apart, by an argument that does not ask whether they were noticed:

- of a barrier, a wait or a fence: in the unchanged kernel nothing needed it. No access of another warp comes before an
  access because of this barrier alone, the group that is waited for is empty or a later wait brings it before it is
  used, each write has another fence, there is no other program that a release could be for.
- of what computes: every output and gradient has the bits of the unchanged run's, or is as near to float64. A mask was
  left out where a valid number is loaded and not used, a product has a factor of zeros or is masked later, what a
  kernel subtracts before it sums squares is another number.
"""

from __future__ import annotations

import contextlib
import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from genai_fast import testing
from genai_fast.emulator.driver_triton import EmulatedGPU
from genai_fast.emulator.findings import KernelFault
from genai_fast.emulator.record import Record
from genai_fast.registry import OPS
from genai_fast.testing import Run, assert_matches_reference

BUDGET = 20_000_000  # warp instructions: a loop that a change has made endless ends there

# Cases that reach barriers, copies, matrix products, reductions, masks and the barrier among programs.
CASES = (
    "reparameterize-vector", "vae_loss-mnist", "batch_norm_act-dcgan_block", "batch_norm_act-channels_last",
    "bias_act-discriminator", "conv_transpose2d-channels_last", "conv_transpose2d-many_rows", "cross_entropy-gpt",
    "gated_act-pair", "rotary-gpt_j", "layer_norm-gpt", "gru-many_rows", "gru-wide", "lstm-many_rows",
    "lstm-wide", "causal_attention-gpt", "causal_attention-head_dim_128", "causal_attention-not_causal",
    "causal_attention-dropout", "decode_attention-one_token", "decode_linear-gpt2_like",
)  # fmt: skip


def runs(names: Collection[str] = ()) -> list[Run]:
    """Of CASES, in float16: it reaches the tensor cores, and its rounding hides less than that of bfloat16.

    Args:
        names: of ops or of folders of kernels/; all by default.
    """
    chosen = [op for op in OPS.values() if not names or {op.name, op.folder} & {*names}]
    cases = [(op, case) for op in chosen for case in op.cases if f"{op}-{case}" in CASES]
    return [Run(op, case, torch.float16, "triton", "cpu") for op, case in cases]


def _later_by_16(line: str) -> str:
    return re.sub(r"\+\s*(\d+)\s*\]", lambda m: f"+ {int(m[1]) + 16} ]", line, count=1)


def _less_waiting(line: str) -> str:
    return re.sub(r"(\d+);", lambda m: f"{int(m[1]) + 1};", line)


_GUARD = r"(@!?%p\d+ )?"
# Kind of change: a pattern of the lines that it applies to, and the new line.
KINDS: dict[str, tuple[str, Callable[[str], str]]] = {
    "barrier removed": (r"bar\.sync", lambda s: ""),
    "cp.async waits for one group less": (r"cp\.async\.wait_group", _less_waiting),
    "wgmma waits for one group less": (r"wgmma\.wait_group", _less_waiting),
    "proxy fence removed": (r"fence\.proxy\.async", lambda s: ""),
    "release or acquire made relaxed": (_GUARD + r"(atom|ld|st)\.(.*\.)?(release|acquire|acq_rel)",
                                        lambda s: re.sub(r"\.(release|acquire|acq_rel)", ".relaxed", s)),
    "shared address 16 bytes on": (_GUARD + r"(st|ld)\.shared.*\[\s*%r\d+\s*\+\s*\d+\s*\]", _later_by_16),
    "global address 16 bytes on": (_GUARD + r"(st|ld)\.global.*\[\s*%rd\d+\s*\+\s*\d+\s*\]", _later_by_16),
    "load or store without its mask": (r"@!?%p\d+ (ld|st)\.global", lambda s: re.sub(r"@!?%p\d+ ", "", s)),
    "shuffle with the lane itself": (r"shfl\.sync\.bfly", lambda s: re.sub(r", (\d+), 31, -1", ", 0, 31, -1", s)),
    "matrix product skipped": (r"(mma|wgmma\.mma_async)\.", lambda s: ""),
    "addend left out": (r"fma\.rn\.f32", lambda s: re.sub(r", [^,]+;$", ", 0f00000000;", s)),
    "comparison the other way": (r"setp\.lt\.s32", lambda s: s.replace("setp.lt", "setp.ge")),
}  # fmt: skip


# Kinds of which the counters say whether anything needed them, and of which results say nothing.
NEEDED = (
    "barrier removed",
    "cp.async waits for one group less",
    "wgmma waits for one group less",
    "proxy fence removed",
    "release or acquire made relaxed",
)
AS_NEAR = 1.01  # times the unchanged run's error
Result = tuple[int, float]  # a digest, and the error against float64


@dataclass(frozen=True)
class Place:
    """One change of one line of a compiled kernel."""

    kind: str
    run: Run
    kernel: str
    ptx: str
    line: int
    text: str  # the new line
    needed: bool  # false: the change changes nothing

    @property
    def before(self) -> str:
        return self.ptx.splitlines()[self.line].strip()

    def changed(self) -> str:
        lines = self.ptx.splitlines()
        lines[self.line] = self.text
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.kind}: {self.kernel} of {self.run}, line {self.line + 1}: {self.before}"


@dataclass
class Outcome:
    """By kind of change, how often it was noticed and by what."""

    found: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    unnoticed: list[Place] = field(default_factory=list)
    kernels: set[str] = field(default_factory=set)

    def add(self, place: Place, verdict: str) -> None:
        self.found[place.kind][verdict] += 1
        self.kernels.add(place.kernel)
        if verdict == "missed":
            self.unnoticed.append(place)

    def __str__(self) -> str:
        lines = [f"changes of {len(self.kernels)} kernels"]
        for kind, verdicts in self.found.items():
            same, missed = verdicts["changes nothing"], verdicts["missed"]
            faulty = sum(verdicts.values()) - same
            ways = [f"{v} {n}" for v, n in verdicts.most_common() if v not in ("changes nothing", "missed")]
            how = ", ".join(ways) or "by nothing"
            lines.append(f"{kind:34s} {faulty - missed:4d} of {faulty:4d} noticed ({how}); {same} more change nothing")
        return "\n".join([*lines, *(f"not noticed: {place}" for place in self.unnoticed)])


def mutate(runs: list[Run], gpu: EmulatedGPU, each: int, seed: int = 1, verbose: bool = True) -> Outcome:
    """Changes `each` places of each kind, one at a time, taken from the kernels of these runs in turn.

    Those that are recognised beforehand as changing nothing are only counted.

    Args:
        gpu: which has been entered, keeps records, and is strict.
    """
    outcome, chance = Outcome(), random.Random(seed)
    found: dict[str, list[Place]] = defaultdict(list)
    results: dict[str, list[Result]] = {}
    for run in runs:
        places, results[str(run)] = places_of(run, gpu)
        seen = {p.ptx for known in found.values() for p in known}
        for place in places:
            if place.ptx not in seen:
                found[place.kind].append(place)
    for kind in KINDS:
        for place in found[kind]:
            if not place.needed:
                outcome.add(place, "changes nothing")
        for place in _in_turn([p for p in found[kind] if p.needed], each, chance):
            outcome.add(place, verdict(place, gpu, results[str(place.run)]))
        if verbose:
            print(f"{kind}: {dict(outcome.found[kind])}", flush=True)
    gpu.change = str
    return outcome


def _in_turn(places: list[Place], most: int, chance: random.Random) -> list[Place]:
    """So many of them, from as many kernels as there are."""
    kernels: dict[str, list[Place]] = defaultdict(list)
    for place in chance.sample(places, len(places)):
        kernels[place.ptx].append(place)
    rounds = [place for turn in range(most) for own in kernels.values() for place in own[turn : turn + 1]]
    return rounds[:most]


def places_of(run: Run, gpu: EmulatedGPU) -> tuple[list[Place], list[Result]]:
    """Every change of the kernels of a run, and its results."""
    gpu.change = str
    gpu.records.clear()
    with _results() as results:
        assert_matches_reference(run)
    kernels = {r.ptx: r.kernel for r in gpu.records}
    return [place for ptx in kernels for place in _places(run, kernels[ptx], ptx, gpu.records)], results


def _places(run: Run, kernel: str, ptx: str, records: list[Record]) -> Iterator[Place]:
    executed: dict[int, tuple[int, int, int]] = defaultdict(lambda: (0, 0, 0))  # by line: warps, lanes, needed
    for record in (r for r in records if r.ptx == ptx):
        for statement, row in zip(record.statements, record.counts.tolist(), strict=True):
            warps, lanes, needed = executed[statement.line]
            executed[statement.line] = warps + row[0], lanes + row[1], needed + row[-1]
    for line, raw in enumerate(ptx.splitlines()):
        warps, lanes, needed = executed[line]
        before = raw.strip()
        for kind, (pattern, change) in KINDS.items():
            if not lanes or not re.match(pattern, before) or change(before) == before:
                continue
            if "mask" not in kind or lanes < 32 * warps:  # a mask that is true in every lane is none
                yield Place(kind, run, kernel, ptx, line, change(before), needed > 0 or kind not in NEEDED)


@contextlib.contextmanager
def _results() -> Iterator[list[Result]]:
    """Of what runs inside the block compute: outputs, what is updated in place, gradients."""
    found: list[Result] = []
    compare = testing._compare

    def noted(run: Run, name: str, got: torch.Tensor, eager: Any, truth: torch.Tensor, order: float, more: Any) -> str:
        digest = zlib.crc32(got.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        found.append((digest, testing._error(got, truth, order)))
        return compare(run, name, got, eager, truth, order, more)

    with mock.patch.object(testing, "_compare", noted):
        yield found


def _alike(one: list[Result], other: list[Result]) -> bool:
    """The same bits, or no farther from float64 but for rounding."""
    pairs = zip(one, other, strict=True)
    return all(a == b or error <= AS_NEAR * least for (a, error), (b, least) in pairs)


def verdict(place: Place, gpu: EmulatedGPU, unchanged: list[Result]) -> str:
    """How a change is noticed; "changes nothing", or "missed".

    Args:
        unchanged: results of the unchanged run.
    """
    changed = place.changed()
    gpu.change = lambda given: changed if given == place.ptx else given
    gpu.warnings.clear()
    try:
        with _results() as found:
            assert_matches_reference(place.run)
    except KernelFault as error:
        return "race" if "race in" in str(error) else "fault"
    except AssertionError:
        return "numerics"
    if gpu.warnings:
        return "warning"
    return "changes nothing" if place.kind not in NEEDED and _alike(found, unchanged) else "missed"
