"""What a launch did wrong: faults, which end it, and findings, which are told when it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from genai_fast.emulator.ptx import Statement


class Kind(IntEnum):
    """As in engine/machine.h."""

    SHARED_READ_AFTER_WRITE = 0
    SHARED_WRITE_AFTER_READ = 1
    SHARED_WRITE_AFTER_WRITE = 2
    UNFENCED = 3
    SHARED_LANES = 4
    GLOBAL_LANES = 5
    GLOBAL_READ_AFTER_WRITE = 6
    GLOBAL_WRITE_AFTER_READ = 7
    GLOBAL_WRITE_AFTER_WRITE = 8
    SHARED_UNWRITTEN = 9
    OUTSIDE_VIEW = 10
    UNFENCED_COPY = 11


_RACE = "race in {} memory between two {}: {}"
_BARRIER = "without a barrier between them"
_ORDER = "without a release and an acquire between them"
_TEXTS = {
    Kind.SHARED_READ_AFTER_WRITE: _RACE.format("shared", "warps", f"a read and a write {_BARRIER}"),
    Kind.SHARED_WRITE_AFTER_READ: _RACE.format("shared", "warps", f"a write and a read {_BARRIER}"),
    Kind.SHARED_WRITE_AFTER_WRITE: _RACE.format("shared", "warps", f"two writes {_BARRIER}"),
    Kind.UNFENCED: "missing fence.proxy.async: a wgmma reads shared memory that a thread wrote",
    Kind.SHARED_LANES: "lanes of one store write different values to one address of shared memory",
    Kind.GLOBAL_LANES: "lanes of one store write different values to one address",
    Kind.GLOBAL_READ_AFTER_WRITE: _RACE.format("global", "{}", f"a read and a write {_ORDER}"),
    Kind.GLOBAL_WRITE_AFTER_READ: _RACE.format("global", "{}", f"a write and a read {_ORDER}"),
    Kind.GLOBAL_WRITE_AFTER_WRITE: _RACE.format("global", "{}", f"two writes {_ORDER}"),
    Kind.SHARED_UNWRITTEN: "shared memory is read before it is written",
    Kind.OUTSIDE_VIEW: "outside the tensor's view, but inside its storage",
    Kind.UNFENCED_COPY: "missing fence.proxy.async: a wgmma reads shared memory that a cp.async wrote",
}
# One value of several that are equal up to rounding, or a neighbour in the same storage: perhaps intended. And Triton
# before 3.7.1 leaves out the fence between cp.async and wgmma: see triton-lang/triton, pull request 10537.
WARNINGS = {Kind.SHARED_LANES, Kind.GLOBAL_LANES, Kind.OUTSIDE_VIEW, Kind.UNFENCED_COPY}


class KernelFault(RuntimeError):
    """A kernel did something wrong; the message names kernel, instruction, source line and tensor."""


@dataclass(frozen=True)
class Finding:
    """Something wrong that did not end the launch."""

    kernel: str
    kind: Kind
    text: str

    @property
    def is_warning(self) -> bool:
        """Whether it may be intended."""
        return self.kind in WARNINGS

    def __str__(self) -> str:
        return f"{self.kernel}: {self.text}"


def finding(kernel: str, statements: list[Statement], row: dict[str, int], tensor: str) -> Finding:
    """From the engine's row; `tensor` names what lies at its address."""
    kind, first, second = Kind(row["kind"]), statements[row["pc_a"]], statements[row["pc_b"]]
    same = row["block_a"] == row["block_b"]
    text = _TEXTS[kind].format("warps of a program" if same else "programs")
    if row["pc_a"] == row["pc_b"]:
        text += f"; {second}"
    else:
        text += f"; {first}, then {second}"
    where = tensor or f"shared address {row['address']}"
    return Finding(kernel, kind, f"{text}; {where} ({row['count']} times)")
