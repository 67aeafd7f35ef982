"""Docstrings of this project as Markdown, for mkdocstrings: sections that begin with `Args:`, `Returns: ...` and so on."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Attributes|Returns|Gradients|Backends|Raises|Source|Yields)( [A-Z]\w+)?:\s*(.*)$")
ITEM = re.compile(r"^([\w*]+(?:, [\w*]+)*(?: \([^)]*\))?): (.*)$")
LISTS = ("Args", "Attributes", "Raises")


def markdown(docstring: str) -> str:
    """The docstring with a bold title for each section, and lists of arguments and errors."""
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        if found := SECTION.match(line):
            section = found[1]
            error = f" `{found[2].strip()}`:" if found[2] else ""
            lines += ["", f"**{section}.**{error} {found[3]}".rstrip(), *([] if found[3] else [""])]
        elif section and line.startswith("    "):
            lines.append(_inside(section, textwrap.dedent(line) if line[4] != " " else line[4:]))
        else:
            if section and line.strip():
                section = ""
                lines.append("")
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _inside(section: str, line: str) -> str:
    if section in LISTS and (item := ITEM.match(line)):
        return f"- `{item[1]}`: {item[2]}"
    return line


class ProjectDocstrings(griffe.Extension):
    """Rewrites each docstring before mkdocstrings reads it as plain Markdown."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
