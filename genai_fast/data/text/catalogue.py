"""Translations out of gettext's .po catalogues."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from genai_fast.data.text.cleaning import UnreadableError, extends_ascii

_CHARSET = re.compile(rb"charset=([\w.:-]+)")
_KEYWORD = re.compile(r"(msgctxt|msgid_plural|msgid|msgstr)(?:\[(\d+)\])?\s*")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"\s*')
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{1,2}|[0-7]{1,3}|.)")
_ESCAPED = re.compile("[\udc80-\udcff]")
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\\": "\\", '"': '"', "'": "'"}


@dataclass
class _Entry:
    fuzzy: bool = False
    strings: dict[str, list[str]] = field(default_factory=dict)  # keyword -> its lines; msgstr[n] as "msgstr n"

    def text(self, keyword: str, encoding: str = "utf-8") -> str:
        """A keyword's string; bytes given as escapes are characters of the encoding."""
        found = "".join(self.strings.get(keyword, ()))
        if not _ESCAPED.search(found):
            return found
        try:
            raw = found.encode(encoding, "surrogateescape")
        except UnicodeEncodeError:  # the file is in UTF-8, whatever it says
            raw, encoding = found.encode("utf-8", "surrogateescape"), "utf-8"
        return raw.decode(encoding, "replace")


def charset(raw: bytes) -> str:
    """The encoding that a catalogue's header names, or ""."""
    found = _CHARSET.search(raw[:65536])
    return found[1].decode("ascii") if found else ""


def translations(text: str) -> Iterator[tuple[str, str]]:
    """(source, target) of a catalogue's messages.

    Left out: the header, fuzzy and obsolete messages, and what has no translation. Contexts are dropped. Of a message
    with plurals two pairs are taken: the singular with the first form and the plural with the second, or with the
    first where the language has no other.

    Raises UnreadableError: this is no catalogue; the message names the line.
    """
    encoding = charset(text[:65536].encode("utf-8", "replace"))
    encoding = encoding if extends_ascii(encoding) else "utf-8"
    for entry in _entries(text):
        source, plural = entry.text("msgid", encoding), entry.text("msgid_plural", encoding)
        if entry.fuzzy or not source:  # the header's is empty
            continue
        first, second = ("msgstr 0", "msgstr 1") if plural else ("msgstr", "")
        found = [(source, first), (plural, second)] if second in entry.strings else [(plural or source, first)]
        for side, keyword in found:
            if target := entry.text(keyword, encoding):
                yield side, target


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
        strings, place = [], 0
        while place < len(line) and (found := _STRING.match(line, place)):
            strings.append(_ESCAPE.sub(_unescape, found[1]))
            place = found.end()
        if not keyword or not strings or place < len(line):
            raise UnreadableError(f"expected a catalogue's msgid, msgstr or string, got {line[:40]!r} in line {number}")
        entry.strings[keyword] += strings
    if keyword:
        yield entry


def _unescape(match: re.Match[str]) -> str:
    code = match[1]
    if code[0] == "x" and len(code) > 1:
        value = int(code[1:], 16)
    elif code[0] in "01234567":
        value = int(code, 8) & 0xFF
    else:
        return _NAMED.get(code, code)
    return chr(value) if value < 0x80 else chr(0xDC00 + value)  # as Python's surrogateescape keeps a byte
