"""Decodes what reads and writes memory, orders it, or multiplies matrices."""

from __future__ import annotations

import re

from genai_fast.emulator.decode import Decoder, Flow, Row, rule, size_of
from genai_fast.emulator.operands import vector
from genai_fast.emulator.ptx import SIZE, Statement, Unsupported

STRONG, ACQUIRE, RELEASE = 1, 2, 4  # Order in engine/clocks.h
_ORDERS = {"relaxed": 0, "volatile": 0, "acquire": ACQUIRE, "release": RELEASE, "acq_rel": ACQUIRE | RELEASE}
_ATOMICS = ("add", "max", "min", "and", "or", "xor", "exch", "cas")


def _order(parts: list[str], atomic: bool) -> int:
    """How an access orders others. An order among the threads of one program orders nothing between programs."""
    named = [p for p in parts if p in _ORDERS]
    if "cta" in parts or not (named or atomic):
        return 0
    return STRONG | (_ORDERS[named[0]] if named else 0)


def _in_shared(parts: list[str]) -> bool:
    return any(p.startswith("shared") for p in parts)


def _access(d: Decoder, row: Row, parts: list[str], address: str, registers: list[str]) -> None:
    if "local" in parts:
        raise Unsupported("local memory")
    space, kind = "shared" if _in_shared(parts) else "global", parts[-1]
    size = 1 if kind == "b8" else size_of(kind)
    width = next((d.operands.sizes[r] for r in registers if r in d.operands.sizes), max(size, 2))
    row.o[0], row.mod[4], row.imm = d.operands.address(address)
    row.mod[:4] = len(registers), size, width, int(kind[0] == "s" and size < width)
    row.mod[5] = _order(parts, False)
    d.put(row, *[(r, width) for r in registers], at=1)
    row.handler = f"{parts[0]}.{space}"


@rule("ld")
def _ld(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    if "param" in parts:
        return _parameter(d, row, s, parts)
    _access(d, row, parts, s.operands[1], vector(s.operands[0]))
    if row.mod[5] and row.handler == "ld.global":
        row.flow = Flow.YIELD
    return None


def _parameter(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    name, _, added = s.operands[1][1:-1].partition("+")
    if added or name.strip() not in d.operands.parameters:
        raise Unsupported(f"parameter {s.operands[1]}")
    offset, have = d.operands.parameters[name.strip()]
    want = d.operands.bytes_of(s.operands[0])
    row.o[:2] = d.operands.offset(s.operands[0], want), offset
    if want == have:
        row.handler = f"mov.b{8 * want}"
    else:
        sign = "s" if parts[-1].startswith("s") else "u"
        row.mod[:2], row.handler = (want, have), f"cvt.{sign}{8 * want}.{sign}{8 * have}"


@rule("st")
def _st(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    _access(d, row, parts, s.operands[0], vector(s.operands[1]))


@rule("atom", "red")
def _atomic(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    kind, operands = parts[-1], s.operands if parts[0] == "atom" else ["_", *s.operands]
    size, which = size_of(kind), [p for p in parts if p in _ATOMICS]
    if not which or any(re.fullmatch(r"v\d", p) for p in parts):
        raise Unsupported(s.name)
    row.o[0] = d.operands.offset(operands[0], size)
    row.o[1], row.mod[4], row.imm = d.operands.address(operands[1])
    d.put(row, *[(text, size) for text in operands[2:4]], at=2)
    row.mod[0], row.mod[5] = int(_in_shared(parts)), _order(parts, True)
    row.handler = f"{parts[0]}.{which[0]}.{kind}"
    if parts[0] == "atom" and not row.mod[0]:
        row.flow = Flow.YIELD


@rule("membar", "fence")
def _fence(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    if parts[1] == "proxy":
        if parts[2] != "async":
            raise Unsupported(s.name)
        row.handler = "fence.proxy.async"
    elif "cta" not in parts and "mbarrier_init" not in parts:
        row.handler = "fence"


@rule("cp")
def _cp(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    o = s.operands
    if parts[1] != "async" or {"bulk", "mbarrier"} & {*parts}:
        raise Unsupported(s.name)
    if "commit_group" in parts:
        row.handler = "cp.async.commit_group"
    elif "wait_group" in parts or "wait_all" in parts:
        row.handler, row.imm = "cp.async.wait_group", d.operands.immediate(o[0]) if o else -1
    else:
        row.handler, row.imm = "cp.async", d.operands.immediate(o[2])
        row.o[0], width, row.mod[0] = d.operands.address(o[0])
        row.o[1], wide, row.mod[1] = d.operands.address(o[1])
        if (width, wide) != (4, 8):
            raise Unsupported("addresses of other sizes")
        given = len(o) > 3 and d.operands.bytes_of(o[3]) == 4  # else it is a cache policy
        row.o[2] = d.operands.offset(o[3], 4) if given else d.operands.constant(4, row.imm)


@rule("ldmatrix", "stmatrix")
def _move_matrices(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    registers, address = s.operands if parts[0] == "ldmatrix" else reversed(s.operands)
    if "m8n8" not in parts or parts[-1] != "b16":
        raise Unsupported(s.name)
    members = vector(registers)
    row.o[0], _, row.imm = d.operands.address(address)
    row.mod[:2] = len(members), int("trans" in parts)
    d.put(row, *[(r, 4) for r in members], at=1)
    row.handler = parts[0]


@rule("mma")
def _mma(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    to, a, b, c = parts[-4:]
    if parts[4:6] != ["row", "col"] or a != b or to != c:
        raise Unsupported(s.name)
    for at, text in zip((0, 4, 8, 12), s.operands, strict=True):
        d.put(row, *[(r, 4) for r in vector(text)], at=at)
    row.handler = f"mma.{parts[3]}.{to}.{a}"


@rule("wgmma")
def _wgmma(d: Decoder, row: Row, s: Statement, parts: list[str]) -> None:
    o = s.operands
    if parts[1] == "fence":
        return
    if parts[1] in ("commit_group", "wait_group"):
        row.handler, row.imm = f"wgmma.{parts[1]}", d.operands.immediate(o[0]) if o else 0
        return
    shape = re.search(r"m64n(\d+)k(\d+)", s.name)
    to, a, b = parts[-3:]
    results, factors = vector(o[0]), vector(o[1])
    if shape is None or to != "f32" or a != b or len(results) != int(shape[1]) // 2 or to not in SIZE:
        raise Unsupported(s.name)
    row.imm = len(d.extra)
    d.extra += [d.operands.offset(r, 4) for r in results]
    in_registers = o[1].startswith("{")
    d.put(row, (o[3], 4), *[(r, 4 if in_registers else 8) for r in factors])
    row.o[5] = d.operands.offset(o[2], 8)
    signs, across = [d.operands.immediate(x) for x in o[4:6]], [d.operands.immediate(x) for x in o[6:]]
    a_across = across[0] if across and not in_registers else 0
    row.mod[:5] = int(shape[1]), int(in_registers), a_across, across[-1] if across else 0, int(signs[0] * signs[1] < 0)
    row.handler = f"wgmma.k{shape[2]}.{a}"
