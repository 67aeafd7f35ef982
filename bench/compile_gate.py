"""The compile gate: every Triton kernel compiled for every architecture, without a GPU.

    python -m bench.compile_gate [FOLDER ...] [--arch 80 90]  the table, of these folders of kernels/ or of all
    python -m bench.compile_gate --check                   and a comparison with the committed one
    python -m bench.compile_gate --update                  and the committed one rewritten
    python -m bench.compile_gate --check --once            each kernel as one case launches it: for tests

What is compiled are the launches of the ops' bench cases and compile cases, as bench.launches records them; for the
two newest architectures, each kernel's first.

Each committed table, bench/gate/triton-<version>.json, is of one Triton version, whose compiler is part of
what is measured. `--check` fails on spills, on lost matrix instructions or loads of 16 bytes, on registers or
shared memory that leave room for fewer warps, on more instructions, and on what the op's spec expects of a kernel.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench import sass
from bench.launches import Launch, launches
from bench.report.files import write_all, write_json
from genai_fast import registry
from genai_fast.kernels.common.extension import interpreting
from genai_fast.kernels.common.spec import PRECISIONS, Case, Expected, OpSpec

ARCHITECTURES = (80, 90, 100, 120)
LIMITED = 90  # the architecture of Expected.most
CHOSEN_SPILL = 16  # bytes a thread that ptxas may spill with registers to spare: fewer of them, for more warps
MOST_REGISTERS = 255
INSTRUCTION_SLACK = 0.03  # relative: compilers reorder, so a handful more is no regression
TABLES = Path(__file__).parent / "gate"
REMEDY = "if this is intended: python -m bench.compile_gate --update"

Row = dict[str, Any]  # what one kernel uses on one architecture, or {"error": why it does not compile}


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs on one multiprocessor share (CUDA Programming Guide, compute capabilities)."""

    warps: int
    programs: int
    shared_bytes: int
    registers: int = 4 * 16384  # of its four parts

    def resident_warps(self, row: Row) -> int:
        """Warps that fit at a time: what hides latency."""
        a_warp = 32 * 8 * -(-row["registers"] // 8)
        by_registers = 4 * (self.registers // 4 // a_warp) // row["num_warps"]
        by_shared = self.shared_bytes // (row["shared_bytes"] + 1024)
        return row["num_warps"] * min(by_registers, by_shared, self.programs, self.warps // row["num_warps"])


MULTIPROCESSORS = {
    80: Multiprocessor(warps=64, programs=32, shared_bytes=164 * 1024),
    90: Multiprocessor(warps=64, programs=32, shared_bytes=228 * 1024),
    100: Multiprocessor(warps=64, programs=32, shared_bytes=228 * 1024),
    120: Multiprocessor(warps=48, programs=24, shared_bytes=100 * 1024),
}


@dataclass(frozen=True)
class Job:
    """One kernel to compile for one architecture."""

    name: str  # <folder>/<kernel>/<op>-<case that launches it>-<precision>
    launch: Launch
    arch: int
    expected: Expected = field(default_factory=Expected)
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.name}/sm_{self.arch}"

    def key(self) -> str:
        """Changes with the kernel, the functions it calls, its arguments, Triton and the way of counting."""
        import triton

        counting = Path(sass.__file__).read_bytes()
        options = (triton.__version__, self.arch, *self.launch.options.items())
        return hashlib.sha256(f"{self.launch.source().hash()}{options}".encode() + counting).hexdigest()

    def row(self, usage: dict[str, Any]) -> Row:
        """What is committed: the usage, and instructions per element (a warp executes each for 32 threads).

        All are counted once: exact for straight-line code, too many if some branch is rare.
        """
        if "error" in usage:
            return usage
        warps = self.launch.options["num_warps"]
        elements = self.expected.elements and self.expected.elements(self.launch.named_constants())
        per_element = round(usage["instructions"] * 32 * warps / elements, 2) if elements else None
        return {"num_warps": warps, **usage, "instructions_per_element": per_element}


def jobs(architectures: Iterable[int], folders: Collection[str] = ()) -> list[Job]:
    """Every kernel as the bench cases and compile cases of its folder's ops launch it, by the first case that does.

    Only a kernel's first launch is compiled for the two newest architectures: that it compiles there, and without
    spills, is what is asked of them.

    Args:
        folders: of kernels/; all by default.
    """
    found: dict[tuple[str, int, str], Job] = {}
    begun: set[str] = set()
    newest: set[tuple[str, str, int]] = set()
    for op in registry.OPS.values():
        if (folders and op.folder not in folders) or not any("triton" in library.kernels for library in op.library):
            continue
        own = (f"genai_fast.kernels.{op.folder}.", "genai_fast.kernels.common.")
        first = op.folder not in begun
        begun.add(op.folder)
        for case, precision in _cases(op, first):
            if PRECISIONS[precision][0] not in op.dtypes:
                continue
            for arch in architectures:
                seen: Counter[str] = Counter()
                for launch in launches(op, case, precision, arch):
                    key = op.folder, arch, launch.identity
                    if key in found or not launch.module.startswith(own):
                        continue
                    if arch > LIMITED and (launch.module, launch.kernel, arch) in newest:
                        continue
                    newest.add((launch.module, launch.kernel, arch))
                    seen[launch.kernel] += 1
                    name = f"{op.folder}/{launch.kernel[1:]}/{op}-{case}-{precision}"
                    name += f"-{seen[launch.kernel]}" if seen[launch.kernel] > 1 else ""
                    expected = op.expected.get(launch.kernel, Expected())
                    found[key] = Job(name, launch, arch, expected, precision)
    repeated = [name for name, times in Counter(map(str, found.values())).items() if times > 1]
    if repeated:
        raise ValueError(f"{repeated[0]}: two launches have this name; rename a case in the spec")
    return list(found.values())


def _cases(op: OpSpec, first: bool) -> Iterator[tuple[Case, str]]:
    """And how each is launched: the first bench case of a folder in every precision, the others in bfloat16."""
    for k, case in enumerate(op.bench_cases):
        yield from ((case, precision) for precision in ("bf16", *(("fp32", "tf32") if first and not k else ())))
    for case in op.compile_cases:
        yield from ((case, precision) for precision in case.precisions)


def once(todo: list[Job]) -> list[Job]:
    """The first launch of each kernel on each architecture."""
    found: dict[tuple[str, str, int], Job] = {}
    for job in todo:
        found.setdefault((job.launch.module, job.launch.kernel, job.arch), job)
    return list(found.values())


def _compile(launch: Launch, arch: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    try:
        compiled = triton.compile(launch.source(), target=GPUTarget("cuda", arch, 32), options=launch.options)
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        return sass.analyse(compiled.asm["cubin"], compiled.metadata.shared, tools).as_dict()
    except Exception as error:  # whatever the compiler raises is the result
        return {"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:500]}


def _compile_apart(waiting: list[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Usages as they are ready. Should a compiler abort, and its process with it, each is tried alone."""
    fork = get_context("fork")
    done, work = 0, [(job.launch, job.arch) for job in waiting]  # as much of a job as can be sent to a process
    try:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=fork) as pool:
            for job, usage in zip(waiting, pool.map(_compile, *zip(*work, strict=True)), strict=True):
                done += 1
                yield job, usage
    except BrokenProcessPool:
        for job, sent in zip(waiting[done:], work[done:], strict=True):
            try:
                with ProcessPoolExecutor(1, mp_context=fork) as pool:
                    yield job, pool.submit(_compile, *sent).result()
            except BrokenProcessPool:
                yield job, {"error": "the compiler aborted"}


def cache_folder() -> Path:
    """Where usages are kept by the hash of their source."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "genai_fast" / "compile_gate"


def measure(todo: list[Job], cache: Path) -> dict[str, Row]:
    """The table of these jobs; what is in the cache is not compiled again. Failures are never kept."""
    usages: dict[str, dict[str, Any]] = {}
    waiting: list[Job] = []
    kept = {str(job): cache / f"{job.key()}.json" for job in todo}
    for job in todo:
        try:
            usages[str(job)] = json.loads(kept[str(job)].read_text())
        except (OSError, ValueError):
            waiting.append(job)
    for job, usage in _compile_apart(waiting) if waiting else ():
        usages[str(job)] = usage
        if "error" not in usage:
            write_json(kept[str(job)], usage)
    return {str(job): job.row(usages[str(job)]) for job in todo}


def violations(
    todo: list[Job], table: dict[str, Row], committed: dict[str, Row] | None, every: list[Job] | None = None
) -> list[str]:
    """What is wrong with `table`: by itself, and (unless `committed` is None) against the committed one.

    `every`: all jobs that the committed table is of, if `todo` is a part of them.
    """
    wrong = []
    for job in todo:
        name, row = str(job), table[str(job)]
        before = (committed or {}).get(name)
        if "error" in row:
            # The two newest architectures are listed as what they are; elsewhere a kernel has to compile.
            known = before is not None and "error" in before and job.arch > LIMITED
            if not known and (committed is not None or job.arch <= LIMITED):
                wrong.append(f"{name}: expected it to compile, got {row['error']}")
            continue
        wrong += [f"{name}: {message}" for message in _absolute(job, row)]
        if committed is not None and before is None:
            wrong.append(f"{name}: expected a row in the committed table, got none; {REMEDY}")
        elif before is not None and "error" not in before:
            wrong += [f"{name}: {message}; {REMEDY}" for message in _relative(job.arch, row, before)]
    if committed is not None:
        architectures, names = {job.arch for job in todo}, {str(job) for job in every or todo}
        stale = [n for n in committed if n not in names and int(n.rsplit("_", 1)[1]) in architectures]
        wrong += [f"{name}: expected a launch of this name, got none; {REMEDY}" for name in stale]
    return wrong


def _absolute(job: Job, row: Row) -> Iterator[str]:
    expected, constants = job.expected, job.launch.named_constants()
    may_spill = expected.may_spill is not None and expected.may_spill(constants)
    chosen = 0 < row["spill_bytes"] <= CHOSEN_SPILL and row["registers"] < MOST_REGISTERS
    if (row["spill_bytes"] or row["local_accesses"]) and not (may_spill or chosen):
        yield (
            f"spills: expected 0 bytes, got {row['spill_bytes']} bytes a thread and {row['local_accesses']}"
            f" accesses to local memory; use a smaller block or more warps"
        )
    exact = job.precision == "fp32" and constants.get("PRECISION") == "ieee"
    if expected.tensor_cores and not exact and not row["tensor_cores"]:
        yield "matrix instructions: expected some, got none; the kernel multiplies on the ordinary units"
    aligned = all(map(job.launch.is_aligned, expected.wide_loads or ()))
    if expected.wide_loads is not None and aligned and not row["wide_loads"]:
        yield "loads of 16 bytes: expected some, got none; strides or masks hide that addresses are aligned"
    limit, got = expected.most(constants) if callable(expected.most) else expected.most, row["instructions_per_element"]
    if job.arch == LIMITED and limit is not None and aligned:
        if got is None:
            yield "instructions per element: the kernel has a limit, but no `elements` to count them by"
        elif got > limit:
            yield f"instructions per element: expected at most {limit:g}, got {got:g}"


def _relative(arch: int, row: Row, before: Row) -> Iterator[str]:
    if row["wide_loads"] < before.get("wide_loads", 0):
        yield f"loads of 16 bytes: expected {before['wide_loads']}, got {row['wide_loads']}"
    if row["spill_bytes"] > before["spill_bytes"]:
        yield f"spills: expected at most {before['spill_bytes']} bytes a thread, got {row['spill_bytes']}"
    lost = sorted(set(before["tensor_cores"]) - set(row["tensor_cores"]))
    if lost:
        got = ", ".join(row["tensor_cores"]) or "none"
        yield f"matrix instructions: expected {', '.join(lost)}, got {got}"
    room = MULTIPROCESSORS[arch].resident_warps
    if room(row) < room(before):
        resources = "{registers} registers, {shared_bytes} bytes of shared memory, {num_warps} warps a program"
        yield (
            f"occupancy: expected {room(before)} resident warps ({resources.format(**before)}),"
            f" got {room(row)} ({resources.format(**row)})"
        )
    for count in ("instructions", "loop_instructions", "instructions_per_element"):
        expected, got = before[count], row[count]
        if expected and got and got > expected * (1 + INSTRUCTION_SLACK):
            yield f"{count}: expected at most {expected:g} (+{INSTRUCTION_SLACK:.0%}), got {got:g}"


_COLUMNS = {"registers": "registers", "spill_bytes": "spill B", "shared_bytes": "shared B", "wide_loads": "16 B loads"}
_COLUMNS |= {"instructions": "SASS", "loop_instructions": "in loop", "instructions_per_element": "per element"}


def render(table: dict[str, Row]) -> str:
    """The table as aligned text."""
    lines = [["kernel", "arch", *_COLUMNS.values(), "warps/SM", "matrix"]]
    for name, row in table.items():
        kernel, _, arch = name.rpartition("/")
        if "error" in row:
            lines.append([kernel, arch, f"DOES NOT COMPILE: {row['error'].splitlines()[0]}"])
            continue
        cells = ["" if row[column] is None else f"{row[column]:g}" for column in _COLUMNS]
        matrix = " ".join(f"{count} {name}" for name, count in row["tensor_cores"].items())
        room = MULTIPROCESSORS[int(arch.removeprefix("sm_"))].resident_warps(row)
        lines.append([kernel, arch, *cells, str(room), matrix])
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    rows = (zip(line, widths, strict=False) for line in lines)  # an error ends its line
    return "\n".join("  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in rows)


def read_table(path: Path) -> dict[str, Row]:
    """What `write_table` wrote; empty if there is no such file."""
    launches = json.loads(path.read_text()) if path.exists() else {}
    return {f"{name}/{arch}": row for name, rows in launches.items() for arch, row in rows.items()}


def write_table(path: Path, table: dict[str, Row]) -> None:
    """One line per launch, by name: its rows, by architecture."""
    launches: dict[str, dict[str, Row]] = defaultdict(dict)
    for name, row in sorted(table.items()):
        launch, _, arch = name.rpartition("/")
        launches[launch][arch] = row
    lines = (f"{json.dumps(name)}: {json.dumps(rows, sort_keys=True)}" for name, rows in launches.items())
    write_all({path: ("{\n" + ",\n".join(lines) + "\n}\n").encode()})


def _covered(name: str, options: argparse.Namespace) -> bool:
    """Whether a row of the committed table is of the chosen folders and architectures."""
    chosen = not options.folders or name.split("/")[0] in options.folders
    return chosen and int(name.rsplit("_", 1)[1]) in options.arch


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_gate", description=__doc__.splitlines()[0])
    folders = sorted({op.folder for op in registry.OPS.values()})
    parser.add_argument("folders", nargs="*", metavar="FOLDER", choices=[*folders, []], help="default: all")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--check", action="store_true", help="fail where the committed table was better")
    parser.add_argument("--once", action="store_true", help="each kernel as one case launches it")
    parser.add_argument("--update", action="store_true", help="write the committed table")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of the committed tables")
    options = parser.parse_args(arguments)
    if options.once and options.update:
        parser.error("--once: expected --check with it, got --update, which writes every case")
    if interpreting():
        print("compile gate: TRITON_INTERPRET is set, and an interpreting process cannot compile; unset it")
        return 2
    import triton

    path = options.tables / f"triton-{triton.__version__}.json"
    committed = read_table(path)
    if options.check and not committed:
        print(f"compile gate: there is no table {path}; remedy: python -m bench.compile_gate --update")
        return 2
    every = jobs(options.arch, options.folders)
    todo = once(every) if options.once else every
    table = measure(todo, cache_folder())
    print(render(table))
    if options.update:
        committed = {n: row for n, row in committed.items() if not _covered(n, options)} | table
        write_table(path, committed)
        print(f"written: {path}")
    compared = {n: row for n, row in committed.items() if _covered(n, options)}
    wrong = violations(todo, table, compared if options.check or options.update else None, every)
    for message in wrong:
        print(f"FAILED {message}")
    print(f"{len(todo)} kernels x architectures under Triton {triton.__version__}, {len(wrong)} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
