"""Where operands lie in a warp's register file: registers, constants, parameters and special registers."""

from __future__ import annotations

import re
import struct

from genai_fast.emulator.ptx import SIZE, Entry, Unsupported, split

LANES = 32
# They come first in a register file, in this order: see start_block in engine/scheduler.cpp.
SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["%laneid", "%warpid"]
_REGISTERS = 1 << 28  # offsets of registers until it is known how many bytes the constants before them take


class Operands:
    """Gives each operand its offset. Constants and parameters come before the registers that change."""

    def __init__(self, entry: Entry) -> None:
        self.constants: dict[tuple[int, int], int] = {}  # (bytes, bits) -> offset
        self.constant_bytes = len(SPECIAL) * 4 * LANES
        self.sizes = {name: SIZE[kind] for name, kind in entry.registers.items()}
        self.parameters: dict[str, tuple[int, int]] = {}  # name -> (offset, bytes)
        self._symbols = {*entry.symbols}
        for name, kind in entry.parameters.items():
            if kind not in SIZE or kind == "b8":
                raise Unsupported(f"{entry.name}: parameter {name} of type {kind}, passed by value")
            size = max(SIZE[kind], 2)
            self.parameters[name] = self._constant_room(size), size
        self._offsets, at = {}, 0
        for name, size in self.sizes.items():
            self._offsets[name] = _REGISTERS + at
            at += LANES * size
        self._register_bytes = at

    @property
    def file_bytes(self) -> int:
        """Of a whole register file."""
        return self.constant_bytes + self._register_bytes

    def placed(self, offset: int) -> int:
        """The offset in the register file, once all constants are known."""
        return offset - _REGISTERS + self.constant_bytes if offset >= _REGISTERS else offset

    def value(self, text: str) -> int | None:
        """An immediate's bits, or an address of shared memory; None for anything else."""
        if m := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
            return int(m[1] or m[2], 16)
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            return int(text.rstrip("U"), 0)
        if re.fullmatch(r"-?\d+\.\d*", text):
            return int(struct.unpack("<I", struct.pack("<f", float(text)))[0])
        if (m := re.fullmatch(r"([\w$]+)(?:\s*\+\s*(\d+))?", text)) and m[1] in self._symbols:
            return int(m[2] or 0)  # one symbol, at 0
        return {"%warp_size": LANES, "WARP_SZ": LANES}.get(text)

    def immediate(self, text: str) -> int:
        """The value of an operand that has to be one."""
        value = self.value(text)
        if value is None:
            raise Unsupported(f"{text}, where an immediate is expected")
        return value

    def offset(self, text: str, size: int, any_size: bool = False) -> int:
        """Of an operand of that many bytes; -1 for the sink `_`."""
        if text == "_":
            return -1
        if text in self._offsets:
            if not any_size and self.sizes[text] != size:
                raise Unsupported(f"operand {text}, of {self.sizes[text]} bytes where {size} are expected")
            return self._offsets[text]
        if text in SPECIAL:
            return SPECIAL.index(text) * 4 * LANES
        value = self.value(text)
        if value is None:
            raise Unsupported(f"operand {text}")
        return self.constant(size, value)

    def constant(self, size: int, bits: int) -> int:
        """The offset of a register that holds this value in every lane."""
        key = size, bits & ((1 << 8 * size) - 1)
        if key not in self.constants:
            self.constants[key] = self._constant_room(size)
        return self.constants[key]

    def bytes_of(self, text: str, otherwise: int = 4) -> int:
        """Of a register; `otherwise` for an immediate."""
        return self.sizes.get(text, otherwise)

    def address(self, text: str) -> tuple[int, int, int]:
        """(offset of the register, its bytes, what is added) of "[register + 16]"."""
        m = re.fullmatch(r"\[\s*([%\w.$@]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if m is None:
            raise Unsupported(f"address {text}")
        added = int(m[2], 0) if m[2] else 0
        if m[1] in self._offsets:
            return self._offsets[m[1]], self.sizes[m[1]], added
        return self.constant(4, self.immediate(m[1])), 4, added

    def _constant_room(self, size: int) -> int:
        at = self.constant_bytes
        self.constant_bytes += LANES * size
        return at


def vector(text: str) -> list[str]:
    """The registers of "{%r1, %r2}", or the one."""
    return split(text[1:-1]) if text.startswith("{") else [text]
