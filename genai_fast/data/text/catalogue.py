"""Translations out of gettext's .po catalogues."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from genai_fast.data.text.cleaning import UnreadableError

_CHARSET = re.compile(rb"charset=([\w.:-]+)")
_KEYWORD = re.compile(r"(msgctxt|msgid_plural|msgid|msgstr)(?:\[(\d+)\])?\s*")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"\s*')
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{1,2}|[0-7]{1,3}|.)")
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\\": "\\", '"': '"', "'": "'"}


@dataclass
class _Entry:
    fuzzy: bool = False
    strings: dict[str, list[str]] = field(default_factory=dict)  # keyword -> its lines; msgstr[n] as "msgstr n"

    def text(self, keyword: str) -> str:
        return "".join(self.strings.get(keyword, ()))


def charset(raw: bytes) -> str:
    """The encoding that a catalogue's header names, or ""."""
    found = _CHARSET.search(raw[:65536])
    return found[1].decode("ascii") if found else ""


def translations(text: str) -> Iterator[tuple[str, str]]:
    """(source, target) of a catalogue's messages.

    Left out: the header, fuzzy and obsolete messages, and what has no translation. Contexts are dropped. Of a message
    with plurals two pairs are taken: the singular with the first form and the plural with the second, or with the
    first where the language has no other.

    Raises:
        UnreadableError: this is no catalogue; the message names the line.
    """
    for entry in _entries(text):
        source, plural = entry.text("msgid"), entry.text("msgid_plural")
        if entry.fuzzy or not source:  # the header's is empty
            continue
        if not plural:
            found = [(source, entry.text("msgstr"))]
        elif "msgstr 1" in entry.strings:
            found = [(source, entry.text("msgstr 0")), (plural, entry.text("msgstr 1"))]
        else:
            found = [(plural, entry.text("msgstr 0"))]
        yield from (pair for pair in found if pair[1])


def _entries(text: str) -> Iterator[_Entry]:
    entry, keyword = _Entry(), ""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        if line.startswith("#"):
            if keyword.startswith("msgstr"):  # comments come before their message
                yield entry
                entry, keyword = _Entry(), ""
            if line.startswith("#,"):
                entry.fuzzy |= "fuzzy" in (flag.strip() for flag in line[2:].split(","))
            continue
        if found := _KEYWORD.match(line):
            name, form = found.groups()
            starts = name == "msgctxt" or (name == "msgid" and keyword != "msgctxt")
            if starts and keyword:
                yield entry
                entry = _Entry()
            keyword = name if name != "msgstr" else f"msgstr {form}" if form else name
            if keyword in entry.strings or (not starts and "msgid" not in entry.strings and name != "msgid"):
                raise UnreadableError(f"expected each message to begin with one msgid, got {name} in line {number}")
            entry.strings[keyword] = []
            line = line[found.end() :]
        strings = list(_STRING.finditer(line))
        if not keyword or not strings or "".join(match[0] for match in strings) != line:
            raise UnreadableError(f"expected a catalogue's msgid, msgstr or string, got {line[:40]!r} in line {number}")
        entry.strings[keyword] += (_ESCAPE.sub(_unescape, match[1]) for match in strings)
    if keyword:
        yield entry


def _unescape(match: re.Match[str]) -> str:
    code = match[1]
    if code[0] == "x" and len(code) > 1:
        return chr(int(code[1:], 16))
    return chr(int(code, 8)) if code[0] in "01234567" else _NAMED.get(code, code)
