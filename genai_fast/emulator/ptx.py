"""Reads PTX: the statements of an entry, its parameters, registers and labels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Bytes of a register of each type; a predicate takes a lane's mask.
SIZE = {
    "pred": 4, "b8": 2, "b16": 2, "b32": 4, "b64": 8, "u8": 1, "s8": 1, "u16": 2, "s16": 2, "u32": 4, "s32": 4,
    "u64": 8, "s64": 8, "f16": 2, "bf16": 2, "tf32": 4, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "s16x2": 4,
    "u16x2": 4,
}  # fmt: skip

_ENTRY = re.compile(r"\.visible \.entry ([\w$]+)\((.*?)\)(.*?)\{", re.S)
_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+)[^,\n]*?([\w$]+)(?:\[\d+\])?,?\n")
_SHARED = re.compile(r"\.extern \.shared[^;]*?([\w$]+)\[\]")
_NAME = re.compile(r"[%A-Za-z_$][\w$]*")


class Unsupported(NotImplementedError):
    """Something in a kernel's PTX that the emulator does not implement; the message names it."""


@dataclass
class Statement:
    """One instruction."""

    name: str  # with its modifiers: ld.global.v4.b32
    operands: list[str]
    guard: str  # "%p1", "!%p1" or ""
    source: str  # file and line that it comes from
    text: str
    line: int  # of the PTX, from 0

    def __str__(self) -> str:
        """For messages: the instruction, shortened if it names many registers, and its source line."""
        text = self.text if len(self.text) <= 120 else f"{self.text[:60]} ... {self.text[-40:]}"
        return f"`{text}` of {self.source or f'PTX line {self.line + 1}'}"


@dataclass
class Entry:
    """One kernel."""

    name: str
    target: str  # sm_90a
    parameters: dict[str, str] = field(default_factory=dict)  # name -> type
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    symbols: tuple[str, ...] = ()  # names of shared memory, which begins at 0
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index of a statement


def split(text: str) -> list[str]:
    """At the commas outside braces and brackets."""
    parts, depth, start = [], 0, 0
    for k, c in enumerate(text):
        depth += c in "{[("
        depth -= c in "}])"
        if c == "," and depth == 0:
            parts.append(text[start:k].strip())
            start = k + 1
    tail = text[start:].strip()
    return [*parts, tail] if tail else parts


def parse(ptx: str) -> Entry:
    """The entry of a PTX text.

    Raises:
        Unsupported: there is none, or it declares what is not implemented.
    """
    header, target = _ENTRY.search(ptx), re.search(r"\.target (\w+)", ptx)
    if header is None or target is None:
        raise Unsupported("PTX without an entry or a target")
    entry = Entry(header[1], target[1], symbols=tuple(_SHARED.findall(ptx)))
    entry.parameters = {m[2]: m[1] for m in _PARAMETER.finditer(header[2] + "\n")}
    body = ptx[header.end() :]
    end = re.search(r"^\}", body, re.M)
    if end is None:
        raise Unsupported("PTX whose entry does not end")
    _Reader(entry).read(body[: end.start()], ptx[: header.end()].count("\n"))
    return entry


class _Reader:
    """Of a body. Blocks in braces (inline assembly) have registers and labels of their own: renamed by their number."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.scopes: list[dict[str, str]] = []
        self.blocks = 0
        self.source = ""

    def read(self, body: str, first: int) -> None:
        text = ""  # of a statement that has not ended
        for number, raw in enumerate(body.splitlines()):
            code, _, comment = raw.partition("//")
            code = code.strip()
            if code.startswith(".loc"):
                self.source = comment.strip() or code
                continue
            if not code or code.startswith((".file", ".section")):
                continue
            while code:
                if not text and code[0] == "{":
                    self.blocks += 1
                    self.scopes.append({})
                    code = code[1:].strip()
                elif not text and code[0] == "}":
                    self.scopes.pop()
                    code = code[1:].strip()
                elif not text and (m := re.match(r"([\w$]+):", code)):
                    self.entry.labels[self._own(m[1])] = len(self.entry.statements)
                    code = code[m.end() :].strip()
                else:
                    head, ended, code = code.partition(";")
                    text, code = f"{text} {head}", code.strip()
                    if ended:
                        self._statement(" ".join(text.split()), first + number)
                        text = ""

    def _own(self, name: str) -> str:
        return f"{name}@{self.blocks}" if self.scopes else name

    def _resolve(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def _statement(self, text: str, line: int) -> None:
        if m := re.match(r"\.reg \.(\w+) (.*)", text):
            return self._registers(m[1], split(m[2]))
        if text.startswith((".shared", ".local")):
            raise Unsupported(text)
        if text.startswith("."):
            return None
        guard = ""
        if m := re.match(r"@(!?)([%\w.$]+) (.*)", text):
            guard, text = m[1] + self._resolve(m[2]), m[3]
        name, _, rest = text.partition(" ")
        if self.scopes:
            rest = _NAME.sub(lambda m: self._resolve(m[0]), rest)
        operands = split(rest)
        if name.startswith("bra") and not operands[0].startswith("$L__"):
            operands[0] = self._own(operands[0])
        self.entry.statements.append(Statement(name, operands, guard, self.source, text, line))

    def _registers(self, kind: str, names: list[str]) -> None:
        if kind not in SIZE:
            raise Unsupported(f"registers of type {kind}")
        for name in names:
            if many := re.match(r"(%?[\w$]+)<(\d+)>", name):
                self.entry.registers.update({f"{many[1]}{k}": kind for k in range(int(many[2]))})
            else:
                if self.scopes:
                    self.scopes[-1][name] = self._own(name)
                self.entry.registers[self._resolve(name)] = kind
