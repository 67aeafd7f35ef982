"""What a launch did, as a profiler would count it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from genai_fast.emulator.engine import COUNTS
from genai_fast.emulator.findings import Finding
from genai_fast.emulator.ptx import SIZE, Statement

_SPECIAL_FUNCTIONS = {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"}
_CLASSES = {
    "bra": "branch", "ret": "branch", "exit": "branch", "bar": "barrier", "barrier": "barrier", "shfl": "shuffle",
    "redux": "shuffle", "vote": "shuffle", "mma": "matrix", "ldmatrix": "shared load", "stmatrix": "shared store",
    "atom": "atomic", "red": "atomic", "cvt": "conversion", "setp": "comparison", "selp": "comparison", "mov": "move",
    "cvta": "move",
}  # fmt: skip
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")


def classify(name: str) -> str:
    """The class that a profiler would count an instruction in."""
    parts = name.split(".")
    op, kind = parts[0], parts[-1]
    if op in _CLASSES:
        return _CLASSES[op]
    if op in ("ld", "st"):
        if "param" in parts:
            return "move"
        space = "shared" if any(p.startswith("shared") for p in parts) else "global"
        return f"{space} {'load' if op == 'ld' else 'store'}"
    if op == "cp":
        return "copy" if any(p.startswith("shared") for p in parts) else "barrier"
    if op == "wgmma":
        return "matrix" if "mma_async" in parts else "barrier"
    if op in _SPECIAL_FUNCTIONS or (op == "div" and kind in ("f32", "f64")):
        return "special function"
    if kind in ("f32", "f64"):
        return "float32"
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return "float16"
    return "integer" if kind in SIZE else "other"


@dataclass
class Record:
    """One launch."""

    kernel: str
    ptx: str
    statements: list[Statement]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    counts: np.ndarray  # COUNTS of each statement
    footprint: tuple[int, int]  # distinct bytes read and written, in whole sectors
    findings: list[Finding]
    warp_instructions: int
    block_sectors: int  # sectors that each program read for the first time

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def total(self, what: str, *classes: str) -> int:
        """The sum of one of COUNTS over the statements of these classes."""
        column = self.counts[:, COUNTS.index(what)]
        return sum(int(n) for s, n in zip(self.statements, column, strict=True) if classify(s.name) in classes)

    def by_class(self) -> dict[str, int]:
        """Warp instructions of each class, the most frequent first."""
        found: Counter[str] = Counter()
        for s, row in zip(self.statements, self.counts, strict=True):
            found[classify(s.name)] += int(row[0])
        return {name: n for name, n in found.most_common() if n}

    def flops(self) -> dict[str, int]:
        """Of the matrix instructions, by the type of the factors."""
        found: Counter[str] = Counter()
        for s, row in zip(self.statements, self.counts, strict=True):
            if classify(s.name) == "matrix" and (m := _SHAPE.search(s.name)) and row[0]:
                a_warp = 4 if s.name.startswith("wgmma") else 1  # four warps share one
                kind = next(k for k in ("bf16", "f16", "tf32") if k in s.name.split("."))
                found[kind] += 2 * int(m[1]) * int(m[2]) * int(m[3]) * int(row[0]) // a_warp
        return dict(found)

    @property
    def load_sectors(self) -> int:
        return self.total("sectors", "global load", "copy")

    @property
    def store_sectors(self) -> int:
        return self.total("sectors", "global store")

    @property
    def sector_ratio(self) -> float:
        """Sectors moved over those that the bytes would fill: 1 is ideal, less where lanes read one address."""
        ideal = self.total("ideal", "global load", "copy", "global store")
        return (self.load_sectors + self.store_sectors) / ideal if ideal else 1.0

    @property
    def conflict_ratio(self) -> float:
        """Wavefronts of shared memory over those without bank conflicts: 1 is ideal."""
        ideal = self.total("ideal", "shared load", "shared store")
        return self.total("wavefronts", "shared load", "shared store") / ideal if ideal else 1.0

    def hot_lines(self, most: int = 5) -> list[tuple[str, int]]:
        """Lines of the source with the most warp instructions."""
        found: Counter[str] = Counter()
        for s, row in zip(self.statements, self.counts, strict=True):
            found[s.source] += int(row[0])
        return found.most_common(most)


_COLUMNS = ("kernel", "programs x threads", "warp instr", "load MB", "store MB", "sectors/ideal", "shared conflicts",
            "shared B", "GFLOP", "findings")  # fmt: skip


def table(records: list[Record]) -> str:
    """A line a launch, aligned."""
    lines = [list(_COLUMNS)]
    for r in records:
        loaded, stored = r.total("bytes", "global load", "copy"), r.total("bytes", "global store")
        figures = f"{loaded / 1e6:.3f}", f"{stored / 1e6:.3f}", f"{r.sector_ratio:.2f}", f"{r.conflict_ratio:.2f}"
        flops = sum(r.flops().values()) / 1e9
        first = r.kernel, f"{r.programs} x {r.threads}", f"{r.warp_instructions}"
        lines.append([*first, *figures, f"{r.shared_bytes}", f"{flops:.3f}", f"{len(r.findings)}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
