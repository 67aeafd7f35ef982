"""A compiled kernel that runs on the CPU: its PTX decoded once, launched on CPU tensors.

Kernel(ptx).launch((gx, gy, gz), threads, shared_bytes, {"x_ptr": tensor, "n": 7, "scale": 0.5}) gives a Record.
"""

from __future__ import annotations

import ctypes
import re
import struct
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genai_fast.emulator import decode_memory, engine  # noqa: F401  (the former registers its rules)
from genai_fast.emulator.decode import Decoder, Flow
from genai_fast.emulator.engine import pointer
from genai_fast.emulator.findings import KernelFault, finding
from genai_fast.emulator.memory import Memory
from genai_fast.emulator.operands import LANES
from genai_fast.emulator.ptx import Unsupported, parse
from genai_fast.emulator.record import Record


@dataclass(frozen=True)
class Options:
    """How kernels run."""

    check: bool = True  # find races, missing fences and lanes that disagree; bounds and waits are always checked
    seed: int = 1  # of the order of programs and warps; 0: one after another
    max_resident: int = 132  # programs that fit on the GPU at a time
    budget: int = 2_000_000_000  # warp instructions of a launch, after which it is taken for endless


class Kernel:
    """One entry of a PTX text.

    Raises:
        Unsupported: an instruction that is not implemented; the message names it.
    """

    def __init__(self, ptx: str) -> None:
        self.ptx, self.entry = ptx, parse(ptx)
        self.name, self.statements = self.entry.name, self.entry.statements
        decoded = Decoder(self.entry)
        self.operands = decoded.operands
        library = engine.library()
        for row, statement in zip(decoded.rows, self.statements, strict=True):
            if not library.emulator_knows(row.handler.encode()):
                raise Unsupported(f"{self.name}: {statement}")
        self.waits = _waits(decoded)
        rows = np.array([self._numbers(decoded, k) for k in range(len(decoded.rows))], np.int32)
        immediates = np.array([row.imm for row in decoded.rows], np.int64)
        extra = np.array([self.operands.placed(x) for x in decoded.extra], np.int32)
        names = (ctypes.c_char_p * len(decoded.rows))(*[row.handler.encode() for row in decoded.rows])
        self._code = library.emulator_code(
            len(decoded.rows), names, pointer(rows), pointer(immediates), len(extra), pointer(extra),
            self.operands.file_bytes, self.operands.constant_bytes,
        )  # fmt: skip
        weakref.finalize(self, library.emulator_free, self._code)

    def _numbers(self, decoded: Decoder, k: int) -> list[int]:
        row, guard = decoded.rows[k], self.statements[k].guard
        offset = self.operands.placed(self.operands.offset(guard.lstrip("!"), 4)) if guard else -1
        operands = [self.operands.placed(x) for x in row.o]
        return [row.flow, offset, int(guard.startswith("!")), row.target, *row.mod, *operands]

    def launch(
        self, grid: Sequence[int], threads: int, shared_bytes: int, arguments: Mapping[str, Any],
        options: Options | None = None,
    ) -> Record:  # fmt: skip
        """Runs the kernel.

        Args:
            grid: programs along three axes.
            arguments: by name, in the order of the parameters: a CPU tensor for a pointer, None for a null pointer, or
                a number.

        Raises:
            KernelFault: the kernel leaves its tensors, is misaligned, waits for ever, or reads what is in flight.
        """
        options, library = options or Options(), engine.library()
        if len(arguments) != len(self.entry.parameters):
            raise ValueError(f"{self.name}: expected {len(self.entry.parameters)} arguments, got {len(arguments)}")
        constants = self._constants(list(arguments.values()))
        tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        memory = Memory(tensors)
        counts, notes = np.zeros((len(self.statements), len(engine.COUNTS)), np.uint64), np.zeros(1, engine.NOTES)
        found, number = np.zeros(engine.MOST_FINDINGS, engine.FINDING), ctypes.c_int()
        error = ctypes.create_string_buffer(engine.ERROR_BYTES)
        how = np.zeros(1, engine.OPTIONS)
        how[0] = options.check, options.seed, options.max_resident, self.waits, options.budget
        failed = library.emulator_launch(
            ctypes.c_void_p(self._code), (ctypes.c_int * 3)(*grid), threads, max(shared_bytes, 16), pointer(constants),
            len(memory.ranges), pointer(memory.ranges), pointer(how), pointer(counts), pointer(found),
            engine.MOST_FINDINGS, ctypes.byref(number), pointer(notes), error, engine.ERROR_BYTES,
        )  # fmt: skip
        if failed:
            where, _, message = error.value.decode().partition("|")
            message = re.sub(r"\{tensor (\d+)\}", lambda m: memory.describe(int(m[1])), message)
            raise KernelFault(f"{self.name}: {message}; in {self.statements[int(where)]}")
        rows = [dict(zip(engine.FINDING_FIELDS, row.tolist(), strict=True)) for row in found[: number.value]]
        findings = [finding(self.name, self.statements, row, memory.named(row["address"])) for row in rows]
        steps, block_sectors, _ = notes[0].tolist()
        return Record(
            self.name, self.ptx, self.statements, (grid[0], grid[1], grid[2]), threads, shared_bytes, counts,
            memory.footprint(), findings, steps, block_sectors,
        )  # fmt: skip

    def _constants(self, values: list[Any]) -> np.ndarray:
        """The first part of a register file: constants and parameters, in every lane."""
        filled = np.zeros(self.operands.constant_bytes, np.uint8)

        def put(offset: int, size: int, bits: int) -> None:
            one = (bits & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            filled[offset : offset + LANES * size] = np.frombuffer(one * LANES, np.uint8)

        for (size, bits), offset in self.operands.constants.items():
            put(offset, size, bits)
        for (name, kind), value in zip(self.entry.parameters.items(), values, strict=True):
            put(*self.operands.parameters[name], _bits(kind, value))
        return filled


def _bits(kind: str, value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    if kind in ("f32", "f64"):
        return int.from_bytes(struct.pack("<f" if kind == "f32" else "<d", value), "little")
    if hasattr(value, "data_ptr"):
        return int(value.data_ptr())
    return int(value)


def _waits(decoded: Decoder) -> bool:
    """Whether a program may wait for another one: an atomic or an acquiring load lies in a loop."""
    looks = [k for k, row in enumerate(decoded.rows) if row.flow is Flow.YIELD]
    loops = [(row.target, k) for k, row in enumerate(decoded.rows) if row.flow is Flow.BRANCH and row.target <= k]
    return any(first <= look <= last for first, last in loops for look in looks)
