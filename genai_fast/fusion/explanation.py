"""What `explain` returns: rows, and a table of them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

NOTHING_HERE = "it calls no norm or dropout itself, in a row of single uses"  # why a method stays as it is
_COLUMNS = 100  # of the table


class Row(NamedTuple):
    """Modules at a path: their types, what serves them ("" for PyTorch's own code), and the reasons."""

    path: str
    found: str
    becomes: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What `fuse` does to a model: an iterable of rows; str() gives a table."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [("module", "found", "becomes"), *((row.path or ".", row.found, self._said(row)) for row in self.rows)]
        widths = [max(len(line[k]) for line in lines) for k in (0, 1)]
        room, indent = _COLUMNS - sum(widths) - 4, " " * (sum(widths) + 4)
        text = []
        for path, found, said in lines:
            if room < _COLUMNS // 3:  # the names alone fill a line
                text += [
                    f"{path}  {found}",
                    *textwrap.wrap(said, _COLUMNS, initial_indent="    ", subsequent_indent="    "),
                ]
                continue
            first, *others = textwrap.wrap(said, room)
            text += [f"{path:{widths[0]}}  {found:{widths[1]}}  {first}", *(indent + other for other in others)]
        return "\n".join([*text, self._total()])

    def _said(self, row: Row) -> str:
        if self._holds_others(row):
            return "holds the parts below it"
        return "; ".join(filter(None, (row.becomes, row.reason))) if row.becomes else f"left alone: {row.reason}"

    def _holds_others(self, row: Row) -> bool:
        """Whether a module is left alone because it only calls others, which have rows of their own."""
        below = f"{row.path}." if row.path else ""
        others = (other.path.startswith(below) for other in self.rows if other is not row)
        return row.reason.endswith(NOTHING_HERE) and any(others)

    def _total(self) -> str:
        fused = sum(bool(row.becomes) and row.becomes != "modules" for row in self.rows)
        left = sum(not self._holds_others(row) for row in self.rows) - fused
        return f"total: {fused} {'part runs' if fused == 1 else 'parts run'} fused, {left} left to PyTorch"
