"""What a compiled kernel uses, read from its machine code (SASS) without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
# Some disassemblers write scheduling hints (?trans6, &req={0}) after the operands.
_TARGET = re.compile(r"0x([0-9a-f]+)\s*(?:[?&]|$)")
_PREDICATE = re.compile(r"/\s+@!?U?P\w+\s+")
# Matrix instructions: HMMA (Ampere), HGMMA (Hopper), UTCHMMA (Blackwell), and those of other number formats.
_TENSOR_CORE = re.compile(r"(?:[HQIDBO]G?|UTC[A-Z]*)MMA")


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel on one architecture; instructions are counted as they stand in the code."""

    registers: int  # per thread
    spill_bytes: int  # stack frame, per thread
    local_accesses: int  # loads and stores of local memory (LDL, STL)
    shared_bytes: int  # per program
    wide_loads: int  # loads of global memory that are 16 bytes wide
    instructions: int  # without padding
    loop_instructions: int  # of the largest loop; 0 for straight-line code
    tensor_cores: dict[str, int]  # matrix instructions by name

    def as_dict(self) -> dict:
        return asdict(self)


def analyse(cubin: bytes, shared_bytes: int, tools: Path) -> Usage:
    """Usage of the one kernel in `cubin`; `shared_bytes` is known to its launcher only."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources, code = (
            subprocess.run([tools / "cuobjdump", option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    program = _parse(code)
    if found is None or not program:
        raise ValueError(f"cuobjdump printed no resources or no instructions for this cubin:\n{resources}")
    names = Counter(instruction.name.split(".")[0] for instruction in program)
    return Usage(
        registers=int(found[1]),
        spill_bytes=int(found[2]),
        local_accesses=names["LDL"] + names["STL"],
        shared_bytes=shared_bytes,
        wide_loads=sum(i.name.startswith("LDG") and i.name.endswith(".128") for i in program),
        instructions=sum(instruction.counts for instruction in program),
        loop_instructions=_largest_loop(program),
        tensor_cores={name: count for name, count in sorted(names.items()) if _TENSOR_CORE.fullmatch(name)},
    )


@dataclass(frozen=True)
class _Instruction:
    address: int
    name: str
    predicated: bool  # may or may not be executed
    target: int | None  # of a branch

    @property
    def counts(self) -> bool:
        """Padding (NOP, and the jump to itself that ends the code) does not."""
        return self.name != "NOP" and self.target != self.address


def _parse(code: str) -> list[_Instruction]:
    program = []
    for line in _INSTRUCTION.finditer(code):
        address, name, operands = int(line[1], 16), line[2], line[3]
        jump = _TARGET.search(operands) if name.startswith("BRA") else None
        # BRA.U takes its condition as an operand.
        predicated = bool(_PREDICATE.search(line[0])) or name == "BRA.U"
        program.append(_Instruction(address, name, predicated, int(jump[1], 16) if jump else None))
    return program


def _largest_loop(program: list[_Instruction]) -> int:
    """Instructions of the largest natural loop; waits on a barrier and the like are loops too, but small."""
    index = {instruction.address: i for i, instruction in enumerate(program)}
    successors = []
    for i, instruction in enumerate(program):
        falls_through = instruction.predicated or not instruction.name.startswith(("BRA", "EXIT", "RET", "BRX", "JMP"))
        following = [i + 1] if falls_through and i + 1 < len(program) else []
        successors.append([*following, *([index[instruction.target]] if instruction.target in index else [])])
    predecessors: list[list[int]] = [[] for _ in program]
    for i, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(i)
    bodies: dict[int, set[int]] = {}
    for source, head in _back_edges(successors):
        body = bodies.setdefault(head, {head})  # loops with one head are one loop
        waiting = [source]
        while waiting:
            i = waiting.pop()
            if i not in body:
                body.add(i)
                waiting.extend(predecessors[i])
    return max((sum(program[i].counts for i in body) for body in bodies.values()), default=0)


def _back_edges(successors: list[list[int]]) -> list[tuple[int, int]]:
    """Edges that lead back to an instruction on the path from the entry.

    A jump back from code that the compiler moved behind the kernel's end is none.
    """
    edges, on_path, seen = [], {0}, {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        node, targets = stack[-1]
        for target in targets:
            if target in on_path:
                edges.append((node, target))
            elif target not in seen:
                seen.add(target)
                on_path.add(target)
                stack.append((target, iter(successors[target])))
                break
        else:
            on_path.discard(node)
            stack.pop()
    return edges
