"""Bytes to text, HTML to text, and the one form that all text is brought to."""

from __future__ import annotations

import codecs
import re
import unicodedata
from html.parser import HTMLParser
from typing import NamedTuple

_BOMS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BINARY = 1000  # text has fewer than one zero byte in so many
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
PARAGRAPH = re.compile(r"\n(?:[^\S\n]*\n)+")  # what stands between two
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]")  # all of the three
_META_CHARSET = re.compile(rb"""<meta[^>]{,200}charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)


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

    Raises:
        UnreadableError: the bytes are no text.
    """
    mark, encoding = next(((mark, name) for mark, name in _BOMS if raw.startswith(mark)), (b"", "utf-8"))
    if encoding == "utf-8" and raw.count(0) * _BINARY > len(raw):
        raise UnreadableError("expected text, got binary data (zero bytes)")
    body = raw[len(mark) :]
    try:
        return Decoded(body.decode(encoding), 0, 0)
    except UnicodeDecodeError as error:
        if not mark and _extends_ascii(otherwise):
            encoding = otherwise
            first = _first_error(body, encoding)
        else:
            first = error.start
    kept = body.decode(encoding, "ignore").encode(encoding, "ignore")
    return Decoded(body.decode(encoding, "replace"), max(0, len(body) - len(kept)), first + len(mark))


def _extends_ascii(encoding: str) -> bool:
    """Whether this is an encoding in which ASCII stands for itself, as in a file that names its own."""
    try:
        return b"text".decode(encoding) == "text"
    except (LookupError, ValueError):
        return False


def _first_error(body: bytes, encoding: str) -> int:
    try:
        body.decode(encoding)
        return 0
    except UnicodeDecodeError as error:
        return error.start


def html_charset(raw: bytes) -> str:
    """The encoding that an HTML file names in its first bytes, or ""."""
    found = _META_CHARSET.search(raw[:4096])
    name = found[1].decode("ascii").lower() if found else ""
    return "cp1252" if name in ("iso-8859-1", "latin1", "ascii", "us-ascii") else name  # as browsers read it


def clean(text: str) -> str:
    """The form in which text is stored and given to tokenizers.

    Unicode NFC; line ends are "\\n"; of the control characters only tab and line end are left; lone surrogates are
    U+FFFD; no blank lines before the text, no white space behind it. Everything else stays as it is.
    """
    if _ODD.search(text):  # one search is faster than three
        text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", scalars(text)))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
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


_DROPPED = {"noscript", "script", "style", "template"}
_LINES = {"address", "article", "aside", "dd", "details", "div", "dt", "fieldset", "figcaption", "figure", "footer",
          "form", "header", "li", "main", "nav", "option", "section", "summary", "tr"}  # fmt: skip
_PARAGRAPHS = {"blockquote", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "ol", "p", "pre", "table", "title", "ul"}
_SPACE = re.compile(r"\s+")


class _Text(HTMLParser):
    """Collects what a reader of the page would see."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._dropped: list[str] = []  # open elements whose contents nobody reads
        self._preformatted = 0
        self._breaks = 0  # line ends that come before the next word
        self._space = False  # whether a space comes before it

    def text(self) -> str:
        return "".join(self._parts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _DROPPED:
            self._dropped.append(tag)
        elif tag == "br":
            self._breaks += 1  # two of them are a paragraph
        else:
            self._block(tag)
        self._preformatted += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _DROPPED:
            self.handle_starttag(tag, attrs)
            self._preformatted -= tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self._dropped:
            del self._dropped[self._dropped.index(tag) :]
        self._preformatted -= tag == "pre" and self._preformatted > 0
        if tag != "br":
            self._block(tag)

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        return self.parse_bogus_comment(i)  # "<![x" is a comment to browsers, and an AssertionError in the base class

    def handle_data(self, data: str) -> None:
        if self._dropped:
            return
        if self._preformatted:
            self._put(data)
            return
        words = _SPACE.sub(" ", data)
        self._space |= words.startswith(" ")
        if stripped := words.strip():
            self._put(stripped)
            self._space = words.endswith(" ")

    def _block(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self._breaks = max(self._breaks, 2)
        elif tag in _LINES:
            self._breaks = max(self._breaks, 1)
        elif tag in ("td", "th"):
            self._space = True

    def _put(self, data: str) -> None:
        if self._parts and (self._breaks or self._space):
            self._parts.append("\n" * min(self._breaks, 2) or " ")
        self._breaks, self._space = 0, False
        self._parts.append(data)


def html_text(page: str) -> str:
    """What a reader of an HTML page sees: no scripts and styles, entities resolved, a line for each block, a blank line
    between paragraphs. White space is one space except in <pre>."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    return PARAGRAPH.sub("\n\n", parser.text())
