"""Whether faults are noticed: compiled kernels on the emulated GPU with one executed instruction changed.

Called by `python -m bench.emulate --mutate`. A change is noticed by a fault, by a warning, or by wrong numbers.
Changes that change nothing are left out where they can be recognised: a guard that was true in every lane, a barrier
after which no memory is accessed.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from genai_fast.emulator.driver_triton import EmulatedGPU
from genai_fast.emulator.findings import KernelFault
from genai_fast.emulator.record import Record, classify
from genai_fast.testing import Run, assert_matches_reference

BUDGET = 20_000_000  # warp instructions: a loop that a change has made endless ends there

# Runs that reach barriers, copies, matrix products, reductions, masks and the barrier among programs.
RUNS = (
    "reparameterize-vector", "vae_loss-mnist", "batch_norm_act-dcgan_block", "bias_act-discriminator",
    "conv_transpose2d-many_rows", "cross_entropy-gpt", "gated_act-pair", "rotary-gpt_j", "layer_norm-gpt",
    "gru-many_rows", "causal_attention-gpt", "decode_attention-one_token",
)  # fmt: skip


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


@dataclass
class Outcome:
    """By kind of change, how often it was noticed and by what."""

    found: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    unnoticed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for kind, verdicts in self.found.items():
            total, missed = sum(verdicts.values()), verdicts["nothing"]
            how = ", ".join(f"{verdict} {n}" for verdict, n in verdicts.most_common() if verdict != "nothing")
            lines.append(f"{kind:36s} {total - missed:4d} of {total:4d} noticed ({how or 'by nothing'})")
        return "\n".join([*lines, *(f"not noticed: {text}" for text in self.unnoticed)])


def mutate(runs: list[Run], gpu: EmulatedGPU, each: int, seed: int = 1, verbose: bool = True) -> Outcome:
    """Changes `each` places of each kind in every kernel of these runs, one at a time.

    Args:
        gpu: which has been entered, keeps records, and is strict.
    """
    outcome, chance, seen = Outcome(), random.Random(seed), set()
    for run in runs:
        gpu.change, kernels = str, {}
        gpu.records.clear()
        assert_matches_reference(run)
        for record in gpu.records:
            kernels.setdefault(record.kernel, []).append(record)
        for name, records in kernels.items():
            ptx = records[0].ptx
            if ptx in seen:
                continue
            seen.add(ptx)
            for kind, line, text in _mutants(ptx, records, each, chance):
                changed = ptx.splitlines()
                before, changed[line] = changed[line].strip(), text
                verdict = _verdict(run, gpu, ptx, "\n".join(changed))
                outcome.found[kind][verdict] += 1
                if verdict == "nothing":
                    outcome.unnoticed.append(f"{kind}: {name} of {run}: {before}")
        if verbose:
            tried = sum(sum(verdicts.values()) for verdicts in outcome.found.values())
            print(f"{run}: {tried} changes so far, {len(outcome.unnoticed)} not noticed", flush=True)
    gpu.change = str
    return outcome


def _mutants(ptx: str, records: list[Record], each: int, chance: random.Random) -> Iterator[tuple[str, int, str]]:
    """(kind, line of the PTX, new line)."""
    lines, executed, accesses = ptx.splitlines(), {}, -1
    for record in records:
        if record.ptx != ptx:
            continue
        for statement, row in zip(record.statements, record.counts, strict=True):
            warps, lanes = executed.get(statement.line, (0, 0))
            executed[statement.line] = warps + int(row[0]), lanes + int(row[1])
            if row[1] and classify(statement.name).startswith(("shared", "global", "copy", "atomic")):
                accesses = max(accesses, statement.line)
    backward = [k for k, line in enumerate(lines) if "bra" in line and executed.get(k, (0, 0))[1]]
    last = max([accesses, *(k for k in backward if k < accesses)])
    for kind, (pattern, change) in KINDS.items():
        places = [k for k, line in enumerate(lines) if re.match(pattern, line.strip()) and executed.get(k, (0, 0))[1]]
        if "mask" in kind:
            places = [k for k in places if executed[k][1] < 32 * executed[k][0]]
        if "barrier" in kind:
            places = [k for k in places if k < last]
        for k in chance.sample(places, min(each, len(places))):
            text = change(lines[k].strip())
            if text != lines[k].strip():
                yield kind, k, text


def _verdict(run: Run, gpu: EmulatedGPU, ptx: str, changed: str) -> str:
    gpu.change = lambda given: changed if given == ptx else given
    gpu.warnings.clear()
    try:
        assert_matches_reference(run)
    except KernelFault as error:
        return "race" if "race in" in str(error) else "fault"
    except AssertionError:
        return "numerics"
    return "warning" if gpu.warnings else "nothing"
