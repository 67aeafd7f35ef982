"""Links of the documentation's pages: from files of the repository to pages of the site, and a check of all.

A link to a file that some page includes leads to that page; one to another file of the repository leads to a page that
shows this file.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<!\\)(\[(?:[^\[\]\\]|\\.|\[[^\]]*\])*\])\(([^)\s]+)\)")
FENCE = re.compile(r"\s*(```+|~~~+)")
REFERENCE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


def lines_of(text: str) -> Iterator[tuple[str, bool]]:
    """Lines of Markdown, and whether each is prose: neither in a fence nor indented as code."""
    fence, blank, code = "", True, False
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
            yield line, False
            continue
        code = line.startswith("    ") and (blank or code) and not line.lstrip().startswith(("- ", "|"))
        blank = not line.strip()
        yield line, not fence and not code


def rewritten(text: str, change: Callable[[str], str]) -> str:
    """The text with each link's target changed."""
    parts = ((is_prose, "".join(lines)) for is_prose, lines in _parts(text))
    return "".join(_changed(part, change) if is_prose else part for is_prose, part in parts)


def _parts(text: str) -> Iterator[tuple[bool, list[str]]]:
    """Lines of one kind that follow each other, since a link may be broken between two."""
    for is_prose, lines in itertools.groupby(lines_of(text), lambda line: line[1]):
        yield is_prose, [line for line, _ in lines]


def _changed(part: str, change: Callable[[str], str]) -> str:
    code = [found.span() for found in re.finditer(r"(`+)(?:[^`\n]|\n(?!\n))+\1", part)]

    def replace(found: re.Match[str]) -> str:
        inside = any(start < found.start() < stop for start, stop in code)
        return found[0] if inside else f"{found[1]}({change(found[2])})"

    return LINK.sub(replace, part)


def is_external(target: str) -> bool:
    return re.match(r"[a-z]+:", target) is not None


def repository_path(target: str, base: str) -> str:
    """A link's target as a path in the repository, seen from a file in folder `base`; "/..." counts from its root."""
    path = target[1:] if target.startswith("/") else f"{base}/{target}"
    return os.path.normpath(path)


def relative(target: str, page: str) -> str:
    """The link from one page to another, by their paths in the site."""
    return os.path.relpath(target, PurePosixPath(page).parent)


def slug(heading: str) -> str:
    """The anchor that Python-Markdown makes of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def anchors(text: str) -> set[str]:
    whole = "".join(line for line, is_prose in lines_of(text) if is_prose)
    return {slug(title) for title in re.findall(r"^#+ (.+)$", whole, re.MULTILINE)} | {*REFERENCE.findall(text)}


def broken(pages: dict[str, str]) -> list[str]:
    """What is wrong with the links of these pages (path in the site -> Markdown)."""
    there = {page: anchors(text) for page, text in pages.items()}
    wrong = []
    for page, text in pages.items():
        targets: list[str] = []
        rewritten(text, lambda target: targets.append(target) or target)  # noqa: B023
        for target in targets:
            path, _, anchor = target.partition("#")
            if is_external(target):
                if not target.startswith("https://"):
                    wrong.append(f"{page}: {target}: expected https")
                continue
            found = os.path.normpath(PurePosixPath(page).parent / path) if path else page
            picture = DOCS / found if not found.startswith("source/") else ROOT / found.removeprefix("source/")
            if found not in there and not picture.is_file():
                wrong.append(f"{page}: {target}: there is no such page")
            elif anchor and anchor not in there.get(found, set()):
                wrong.append(f"{page}: {target}: there is no such heading")
    return wrong
