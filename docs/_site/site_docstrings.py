"""Docstrings of this project as Markdown, for mkdocstrings: sections begin with `Args:`, `Returns: ...` and so on."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Attributes|Returns|Gradients|Backends|Raises|Source|Yields)( [A-Z]\w+)?:\s*(.*)$")
ITEM = re.compile(r"^([\w*]+(?:, [\w*]+)*(?: \([^)]*\))?): (.*)$")
TITLES = {"Args": "Arguments"}
LISTS = ("Args", "Attributes", "Raises")


def markdown(docstring: str) -> str:
    """The docstring with a bold title for each section, and lists of arguments and errors."""
    lines: list[str] = []
    section, flush = "", False  # flush: the section's text continues at the margin
    for line in docstring.splitlines():
        if found := SECTION.match(line):
            section, flush = found[1], bool(found[3])
            error = f" `{found[2].strip()}`:" if found[2] else ""
            lines += ["", f"**{TITLES.get(section, section)}.**{error} {found[3]}".rstrip(), *([] if flush else [""])]
        elif section and line.startswith("    "):
            flush = False
            lines.append(_inside(section, line[4:]))
        else:
            if section and line.strip() and not flush:
                section = ""
                lines.append("")
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _inside(section: str, line: str) -> str:
    """A line of a section, without the section's indentation; what continues an item stays indented."""
    if section in LISTS and (item := ITEM.match(line)):
        return f"- `{item[1]}`: {item[2]}"
    return line


class ProjectDocstrings(griffe.Extension):
    """Rewrites each docstring before mkdocstrings reads it as plain Markdown."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
