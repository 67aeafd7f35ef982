"""Decodes statements of PTX into the rows that the engine runs. What has no rule raises Unsupported, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from genai_fast.emulator.operands import Operands, vector
from genai_fast.emulator.ptx import SIZE, Entry, Statement, Unsupported

OPERANDS, MODIFIERS = 26, 6  # of a row: as in engine/machine.h


class Flow(IntEnum):
    """What a row does to the control flow (engine/machine.h)."""

    NORMAL, BRANCH, EXIT, BARRIER, YIELD = range(5)


@dataclass
class Row:
    """An instruction for the engine; what `mod` and `o` mean is said in engine/*.cpp beside each instruction."""

    handler: str = "nothing"
    flow: Flow = Flow.NORMAL
    target: int = -1
    mod: list[int] = field(default_factory=lambda: [0] * MODIFIERS)
    o: list[int] = field(default_factory=lambda: [-1] * OPERANDS)
    imm: int = 0


class Decoder:
    """Of one entry."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.operands = entry, Operands(entry)
        self.extra: list[int] = []  # operands that do not fit into a row
        self.rows = [self._row(s) for s in entry.statements]

    def _row(self, s: Statement) -> Row:
        row, parts = Row(), s.name.split(".")
        rule = RULES.get(parts[0])
        if rule is None:
            raise Unsupported(f"{self.entry.name}: {s}")
        try:
            rule(self, row, s, parts)
        except Unsupported as error:
            raise Unsupported(f"{self.entry.name}: {s}: {error}") from None
        return row

    def put(self, row: Row, *operands: tuple[str, int], at: int = 0) -> None:
        """Operands (text, bytes), one after another."""
        for k, (text, size) in enumerate(operands):
            row.o[at + k] = self.operands.offset(text, size)


Rule = Callable[[Decoder, Row, Statement, list[str]], None]
RULES: dict[str, Rule] = {}  # by the first part of an instruction's name


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of these instructions."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def size_of(kind: str) -> int:
    """Bytes of a register of that type."""
    if kind not in SIZE:
        raise Unsupported(f"type {kind}")
    return SIZE[kind]


@rule("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs", "rcp", "sqrt", "rsqrt", "ex2", "lg2",
      "sin", "cos", "tanh", "and", "or", "xor", "not", "brev", "copysign")  # fmt: skip
def _arithmetic(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    kind, o = parts[-1], s.operands
    size = size_of(kind)
    ignored = {"rn", "approx", "full", "sync"}  # rounded to nearest, and as exactly as it can be
    kept = [p.lower() for p in parts[1:-1] if p not in ignored and not (p == "ftz" and kind != "f32")]
    if "wide" in kept:
        d.put(row, (o[0], 2 * size), (o[1], size), (o[2], size), *([(o[3], 2 * size)] if len(o) > 3 else []))
    else:
        d.put(row, *[(text, size) for text in o])
    row.handler = ".".join([parts[0], *kept, kind])


@rule("shl", "shr")
def _shift(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    size = size_of(parts[-1])
    d.put(row, (s.operands[0], size), (s.operands[1], size), (s.operands[2], 4))
    row.handler = s.name


@rule("bfe", "bfi")
def _bit_field(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    size = size_of(parts[-1])
    count = 2 if parts[0] == "bfe" else 3
    d.put(row, *[(text, size if k < count else 4) for k, text in enumerate(s.operands)])
    row.handler = s.name


@rule("popc", "clz")
def _count_bits(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    d.put(row, (s.operands[0], 4), (s.operands[1], size_of(parts[-1])))
    row.handler = s.name


@rule("prmt", "shf")
def _words(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    d.put(row, *[(text, 4) for text in s.operands])
    row.handler = s.name


@rule("lop3")
def _lop3(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    d.put(row, *[(text, 4) for text in s.operands[:4]])
    row.handler, row.imm = "lop3.b32", d.operands.immediate(s.operands[4])


@rule("selp")
def _selp(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    size = size_of(parts[-1])
    d.put(row, *[(text, size) for text in s.operands[:3]], (s.operands[3], 4))
    row.handler = f"selp.b{8 * size}"


@rule("setp")
def _setp(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    o, size = s.operands, size_of(parts[-1])
    result, _, opposite = o[0].partition("|")
    d.put(row, (result, 4), (o[1], size), (o[2], size))
    if logic := [p for p in parts[2:-1] if p in ("and", "or", "xor")]:
        row.mod[:2] = ("", "and", "or", "xor").index(logic[0]), int(o[3].startswith("!"))
        row.o[3] = d.operands.offset(o[3].lstrip("!"), 4)
    if opposite:
        row.o[4] = d.operands.offset(opposite, 4)
    row.handler = f"setp.{parts[1]}.{parts[-1]}"


@rule("mov")
def _mov(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    size, (to, value) = size_of(parts[-1]), s.operands
    if not to.startswith("{") and not value.startswith("{"):
        d.put(row, (to, size), (value, size))
        row.handler = "mov.pred" if parts[-1] == "pred" else f"mov.b{8 * size}"
        return
    row.handler, whole, items = ("pack", to, value) if value.startswith("{") else ("unpack", value, to)
    members = vector(items)
    part = size // len(members)
    row.mod[:2] = len(members), part
    d.put(row, (whole, size), *[(member, part) for member in members])


@rule("cvta")
def _cvta(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    size = size_of(parts[-1])
    d.put(row, *[(text, size) for text in s.operands])
    row.handler = f"mov.b{8 * size}"


@rule("createpolicy")  # how long a cache keeps a line: nothing to model
def _createpolicy(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    d.put(row, (s.operands[0], 8), ("0", 8))
    row.handler = "mov.b64"


@rule("cvt")
def _cvt(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    (to, from_), modifiers, o = parts[-2:], parts[1:-2], s.operands
    if to in ("bf16x2", "f16x2"):
        if from_ != "f32" or set(modifiers) - {"rn", "relu"}:
            raise Unsupported(s.name)
        d.put(row, *[(text, 4) for text in o])
        row.handler, row.mod[0] = f"cvt.{to}.f32", int("relu" in modifiers)
        return
    if to == "tf32":
        d.put(row, *[(text, 4) for text in o])
        row.handler = f"cvt.{modifiers[0]}.tf32.f32"
        return
    rounding = [m for m in modifiers if m in ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi")]
    if set(modifiers) - {"sat", "ftz", *rounding}:
        raise Unsupported(s.name)
    least = max(size_of(from_), 2)
    row.o[:2] = d.operands.offset(o[0], size_of(to), True), d.operands.offset(o[1], least, True)
    row.mod[:2] = d.operands.bytes_of(o[0], size_of(to)), d.operands.bytes_of(o[1], least)
    row.mod[2:4] = int("sat" in modifiers), int("ftz" in modifiers)
    row.handler = ".".join(["cvt", *rounding, to, from_])


@rule("shfl")
def _shfl(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    to, _, valid = s.operands[0].partition("|")
    row.o[:2] = d.operands.offset(to, 4), d.operands.offset(valid, 4) if valid else -1
    d.put(row, *[(text, 4) for text in s.operands[1:5]], at=2)
    row.handler = f"shfl.{parts[2]}"


@rule("redux")
def _redux(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    d.put(row, *[(text, 4) for text in s.operands])
    row.handler = f"redux.{parts[2]}.{parts[-1]}"


@rule("vote")
def _vote(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    row.mod[0] = int(s.operands[1].startswith("!"))
    d.put(row, (s.operands[0], 4), (s.operands[1].lstrip("!"), 4))
    row.handler = f"vote.{parts[2]}"


@rule("elect")
def _elect(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    to, _, leads = s.operands[0].partition("|")
    d.put(row, (to, 4), (leads, 4))
    row.handler = "elect"


@rule("bar", "barrier")
def _barrier(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    if "warp" in parts:
        return
    if "sync" not in parts:
        raise Unsupported(s.name)
    row.flow = Flow.BARRIER
    row.mod[0] = d.operands.immediate(s.operands[0])
    row.mod[1] = d.operands.immediate(s.operands[1]) if len(s.operands) > 1 else 0


@rule("bra")
def _branch(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    row.flow, row.target = Flow.BRANCH, d.entry.labels[s.operands[-1]]


@rule("ret", "exit")
def _exit(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    row.flow = Flow.EXIT


@rule("griddepcontrol", "prefetch", "nanosleep", "discard", "applypriority")  # of no consequence for what is computed
def _nothing(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    row.handler = "nothing"
