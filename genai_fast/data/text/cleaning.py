"""Bytes to text, and the one form that all text is brought to."""

import codecs
import functools
import re
import unicodedata
from typing import NamedTuple

_BOMS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BINARY = 1000  # text has fewer than one zero byte in this many
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
PARAGRAPH = re.compile(r"\n(?:[^\S\n]*\n)+")  # what stands between two
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]")  # all of the three
_RULE = re.compile(r"[ \t]*(?:[-=*~_+|^]{3}[-=*~_+|^ \t]*|\|.*\|)")  # under a title; of a table; a row of one
_MARKER = re.compile(r"\s*(?:(?:[*+-]|\d+\.|\[\d+\]|\(\w+\))\s+)?")  # indentation, and what begins an item of a list
_HYPHEN = re.compile(r"\w-$")
_MARKS = 200  # on one character; Unicode normalization takes the square of their number
_NO_TEXT = ("idna", "punycode", "unicode_escape", "raw_unicode_escape")
_PROBE = bytes(range(32, 127)) + b"\t\r\n +AGE- ~{"  # UTF-7 and HZ have escapes that are ASCII


class UnreadableError(Exception):
    """A file or a line does not serve; the message says "expected X, got Y"."""


class Decoded(NamedTuple):
    text: str
    replaced: int  # undecodable bytes
    first: int  # the first one's offset in the file; 0 if there is none


def decode(raw: bytes, otherwise: str = "") -> Decoded:
    """Text of a file: UTF-8, or what its byte order mark says; what cannot be decoded becomes U+FFFD.

    Args:
        raw: the file's bytes.
        otherwise: the encoding of a file that has no mark and is not UTF-8 throughout; unknown ones do not count.

    Raises UnreadableError: the bytes are no text.
    """
    mark, encoding = next(((mark, name) for mark, name in _BOMS if raw.startswith(mark)), (b"", "utf-8"))
    if encoding == "utf-8" and raw.count(0) * _BINARY > len(raw):
        raise UnreadableError("expected text, got binary data (zero bytes)")
    body = raw[len(mark) :]
    try:
        return Decoded(body.decode(encoding), 0, 0)
    except UnicodeDecodeError as error:
        if not mark and extends_ascii(otherwise):
            encoding = otherwise
            first = _first_error(body, encoding)
        else:
            first = error.start
    kept = body.decode(encoding, "ignore").encode(encoding, "ignore")
    return Decoded(body.decode(encoding, "replace"), max(0, len(body) - len(kept)), first + len(mark))


def extends_ascii(encoding: str) -> bool:
    """Whether this is an encoding of text in which ASCII stands for itself, as in a file that names its own."""
    try:
        name = codecs.lookup(encoding).name.replace("-", "_")
        return name not in _NO_TEXT and _PROBE.decode(encoding) == _PROBE.decode("ascii")
    except (LookupError, ValueError):
        return False


def _first_error(body: bytes, encoding: str) -> int:
    try:
        body.decode(encoding)
        return 0
    except UnicodeDecodeError as error:
        return error.start


@functools.cache
def _many_marks() -> re.Pattern[str]:
    marks = [chr(code) for code in range(0x300, 0x20000) if unicodedata.combining(chr(code))]
    return re.compile(f"([{''.join(marks)}]{{{_MARKS}}})[{''.join(marks)}]+")


def clean(text: str) -> str:
    """The form in which text is stored and given to tokenizers.

    Unicode NFC; line ends are "\\n"; of the control characters only tab and line end are left; lone surrogates are
    U+FFFD; no blank lines before the text, no white space after it; of the marks on one character, the first 200. All
    else is unchanged.
    """
    if _ODD.search(text):  # one search is faster than three
        text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", scalars(text)))
    if not text.isascii():
        text = unicodedata.normalize("NFC", _many_marks().sub(r"\1", text))
    text = text.rstrip()
    start = len(text) - len(text.lstrip())
    return text[text.rfind("\n", 0, start) + 1 :]  # the first line's own indentation stays


def scalars(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates become U+FFFD."""
    try:
        text.encode()  # several times faster than a search
        return text
    except UnicodeEncodeError:
        return _SURROGATES.sub("\ufffd", text)


def unwrapped(text: str, width: int) -> str:
    """Text without rules and tables drawn in characters, its paragraphs in one line each.

    A line is joined to the one before if its first word did not fit there into `width` columns, and if it is indented
    as that line's words are: so verses, code and lists keep their lines.
    """
    lines: list[str] = []
    last = 0  # columns of the line before, as it was given
    for line in text.split("\n"):
        if _RULE.fullmatch(line):
            last = 0
            continue
        indentation = len(line) - len(line.lstrip())
        first = line[indentation:].partition(" ")[0]
        if first and last and last + 1 + len(first) > width and _MARKER.match(lines[-1]).end() == indentation:
            lines[-1] += ("" if _HYPHEN.search(lines[-1]) else " ") + line[indentation:]
        else:
            lines.append(line)
        last = len(line) if first else 0
    return "\n".join(lines)
