"""Every Triton run of the numerics gate, compiled and executed on an emulated GPU: no GPU is needed.

    python -m bench.emulate [OP ...] [--arch 80 90]   these ops (or folders of kernels/), or all
    python -m bench.emulate --every 8                 each eighth run
    python -m bench.emulate --sample                  the fewest runs that launch every kernel: for tests
    python -m bench.emulate --roofs                   predicted times of the bench cases, a page
    python -m bench.emulate --limits                  what kernels may take, against the limits in the specs
    python -m bench.emulate --mutate 20               whether faults are noticed: 20 places of each kind in some kernels

A run is right if its numbers are (genai_fast.testing) and no kernel leaves its tensors, races, or uses what it has not
waited for (genai_fast.emulator). Warnings are told, and fail nothing.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import limits, mutations, predict
from bench.launches import call
from bench.report.files import write_all
from genai_fast import registry, use_backend
from genai_fast.emulator.devices import DEVICES
from genai_fast.emulator.driver_triton import EmulatedGPU
from genai_fast.kernels.common.extension import interpreting
from genai_fast.kernels.common.spec import OpSpec, Tensors
from genai_fast.testing import Run, assert_matches_reference, emulated_gpu, every_run

PREDICTED = Path(__file__).parent / "results" / "predicted.md"


@dataclass
class Result:
    """Of the runs of one architecture."""

    arch: int
    runs: int = 0
    wrong: dict[str, str] = field(default_factory=dict)  # run -> why
    warnings: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"WARNING {text} ({n} launches)" for text, n in self.warnings.items()]
        lines += [f"FAILED sm_{self.arch} {run}: {why}" for run, why in self.wrong.items()]
        return "\n".join([*lines, f"{self.runs - len(self.wrong)} of {self.runs} runs right"])


def triton_runs(names: Collection[str] = ()) -> list[Run]:
    """Those of the numerics gate; inside an emulated GPU.

    Args:
        names: of ops or of folders of kernels/; all by default.
    """
    runs = [run for run in every_run(("cpu",)) if run.backend == "triton"]
    return [run for run in runs if not names or {run.op.name, run.op.folder} & {*names}]


def launched(run: Run) -> set[tuple[str, str, str]]:
    """(module, kernel, key of the compilation) of what a run launches; nothing is compiled or computed."""
    from triton import knobs

    found = set()

    def instead(*, fn: Any, key: str, **more: Any) -> bool:
        found.add((fn.module, fn.name.rsplit(".", 1)[-1], key))
        return True  # do not compile

    with mock.patch.object(knobs.runtime, "jit_cache_hook", instead), use_backend("triton"), run.products():
        call(run.op, run.case.inputs(Tensors(run.dtype)))
    return found


def sample(runs: list[Run]) -> list[Run]:
    """Few runs that launch every kernel that any of them launches; the ones that compile least, in 16 bits where it is
    equal: those reach the tensor cores.
    """
    compiled = [launched(run) for run in runs]
    kernels = [{(module, name) for module, name, _ in found} for found in compiled]
    missing, chosen = set().union(*kernels), []
    while missing:
        shares = [len(names & missing) / max(len(keys), 1) for names, keys in zip(kernels, compiled, strict=True)]
        best = max(range(len(runs)), key=lambda k, shares=shares: (shares[k], runs[k].dtype is not torch.float32))
        chosen.append(runs[best])
        missing -= kernels[best]
    return chosen


def emulate(runs: list[Run], gpu: EmulatedGPU, verbose: bool = True) -> Result:
    """Each run on the emulated GPU, which has been entered."""
    result = Result(gpu.arch)
    for run in runs:
        start, launches = time.monotonic(), gpu.launches
        gpu.warnings.clear()
        try:
            assert_matches_reference(run)
        except Exception as error:  # whatever a run raises is its result
            result.wrong[str(run)] = f"{type(error).__name__}: {error}"
        result.runs += 1
        result.warnings.update(f"sm_{gpu.arch} {warning}" for warning in gpu.warnings)
        if verbose:
            verdict = "FAILED" if str(run) in result.wrong else "right"
            seconds, count = time.monotonic() - start, gpu.launches - launches
            print(f"sm_{gpu.arch} {run}: {verdict}, {count} launches, {seconds:.1f} s", flush=True)
    return result


def _write_roofs(names: Collection[str]) -> int:
    """The page of all ops; of some it is only printed."""
    cases = [(op, case) for op in _chosen(names) for case in op.bench_cases]
    found: dict[int, list[predict.Figures | None]] = {}
    compared = []
    for arch in predict.CODE:
        with emulated_gpu(arch, check=False, budget=predict.BUDGET) as gpu:
            found[arch] = []
            for op, case in cases:
                mine = predict.ours(op, case, gpu)
                found[arch].append(mine)
                print(f"sm_{arch} {op}-{case}: {mine.launches if mine else 'too many'} launches", flush=True)
                other = predict.ligers(op, case, gpu) if predict.LIGER in predict.CODE[arch] else None
                if mine and other:
                    compared.append(predict.beside(op, case, mine, other))
    rows = [
        predict.row(op, case, dict(zip(found, figures, strict=True)))
        for (op, case), *figures in zip(cases, *found.values(), strict=True)
    ]
    page = predict.page(rows, compared)
    print(page)
    if not names:
        write_all({PREDICTED: page.encode()})
        print(f"written: {PREDICTED}")
    return 0


def _check_limits(names: Collection[str]) -> int:
    wrong = []
    with emulated_gpu(limits.ARCH, seed=1) as gpu:
        for op in _chosen(names):
            if op.limits is None:
                wrong.append(f"{op}: expected limits in its spec, got none")
                continue
            found = limits.launches(op, gpu)
            print(limits.row(op, *found), flush=True)
            wrong += limits.violations(op, *found)
    for message in wrong:
        print(f"FAILED {message}")
    print(f"limits of {len(_chosen(names))} ops, {len(wrong)} exceeded")
    return 1 if wrong else 0


def _mutate(names: Collection[str], architectures: Collection[int], each: int, seed: int) -> int:
    for arch in architectures:
        with emulated_gpu(arch, seed=seed, budget=mutations.BUDGET) as gpu:
            runs = mutations.runs(names)
            print(f"sm_{arch}, {len(runs)} runs:\n{mutations.mutate(runs, gpu, each)}", flush=True)
    return 0


def _chosen(names: Collection[str]) -> list[OpSpec]:
    """Ops that have Triton kernels, of these names or folders, or all."""
    with_triton = [op for op in registry.OPS.values() if "triton" in op.backends]
    return [op for op in with_triton if not names or {op.name, op.folder} & {*names}]


def _emulated(options: argparse.Namespace, arch: int) -> Result:
    with emulated_gpu(arch, keep=False, seed=options.seed) as gpu:
        chosen = triton_runs(options.ops)
        return emulate((sample(chosen) if options.sample else chosen)[:: options.every], gpu)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.emulate", description=__doc__.splitlines()[0])
    names = sorted({name for op in registry.OPS.values() for name in (op.name, op.folder)})
    parser.add_argument("ops", nargs="*", metavar="OP", choices=[*names, []], help="default: all")
    parser.add_argument("--arch", type=int, nargs="+", choices=[*DEVICES], default=[*DEVICES])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th run")
    parser.add_argument("--sample", action="store_true", help="the fewest runs that launch every kernel")
    parser.add_argument("--seed", type=int, default=1, help="of the order of programs and warps; 0: one after another")
    parser.add_argument("--roofs", action="store_true", help="predict the bench cases' times")
    parser.add_argument("--limits", action="store_true", help="compare what kernels take with the limits in the specs")
    parser.add_argument("--mutate", type=int, metavar="N", help="change N instructions of each kind in some kernels")
    options = parser.parse_args(arguments)
    if interpreting():
        print("emulate: TRITON_INTERPRET is set, and an interpreting process cannot compile; unset it")
        return 2
    os.environ["GENAI_FAST_DETERMINISTIC"] = "1"  # no measured choices
    if options.roofs:
        return _write_roofs(options.ops)
    if options.limits:
        return _check_limits(options.ops)
    if options.mutate:
        return _mutate(options.ops, options.arch, options.mutate, options.seed)
    jobs = min(len(options.arch), os.cpu_count() or 1)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) if jobs > 1 else nullcontext() as pool:
        results = list((pool.map if pool else map)(functools.partial(_emulated, options), options.arch))
    for line in [line for result in results for line in str(result).splitlines()[:-1]]:
        print(line)
    runs, wrong = sum(result.runs for result in results), sum(len(result.wrong) for result in results)
    print(f"{runs - wrong} of {runs} runs right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
