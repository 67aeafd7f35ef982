"""HTML to text, in one pass: no page takes longer than its length."""

import html
import re

from genai_fast.data.text.cleaning import PARAGRAPH

_META_CHARSET = re.compile(rb"""<meta[^>]{,200}charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_DROPPED = {"noscript", "script", "style", "template"}
_RAW = {name: re.compile(f"</{name}(?=[\\s/>])", re.IGNORECASE) for name in ("script", "style")}  # no tags in them
_LINES = {"address", "article", "aside", "dd", "details", "div", "dt", "fieldset", "figcaption", "figure", "footer",
          "form", "header", "li", "main", "nav", "option", "section", "summary", "tr"}  # fmt: skip
_PARAGRAPHS = {"blockquote", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "ol", "p", "pre", "table", "title", "ul"}
_SPACE = re.compile(r"\s+")
_NAME = re.compile(r"<(/?)([a-zA-Z][^\s/>]*)")
_COMMENT = re.compile(r"<!--(?:-?>|.*?--!?>|.*)", re.DOTALL)  # one that is not closed extends to the end
_BOGUS = re.compile(r"<(?:[!?]|/[^a-zA-Z])[^>]*>?")
_IN_TAG = re.compile(r"""=\s*(?:"[^"]*"|'[^']*')|>""")
_HUGE = re.compile("&#[xX]?[0-9a-fA-F]{12,};?")  # more digits than any character has: html.unescape would raise


def charset(raw: bytes) -> str:
    """The encoding that an HTML file names in its first bytes, or ""."""
    found = _META_CHARSET.search(raw[:4096])
    name = found[1].decode("ascii", "replace").lower() if found else ""
    return "cp1252" if name in ("iso-8859-1", "latin1", "ascii", "us-ascii") else name  # as browsers read it


def text_of(page: str) -> str:
    """What a reader of an HTML page sees: no scripts and styles, entities resolved, a line for each block, a blank line
    between paragraphs. White space is one space except in <pre>."""
    return PARAGRAPH.sub("\n\n", _Page(page).text())


class _Page:
    """Collects what a reader of the page would see."""

    def __init__(self, page: str) -> None:
        self._parts: list[str] = []
        self._dropped = ""  # the outermost open element whose contents are not shown
        self._preformatted = 0
        self._breaks = 0  # line ends that come before the next word
        self._space = False  # whether a space comes before it
        place = 0
        while (found := page.find("<", place)) >= 0:
            self._data(page[place:found])
            place = self._markup(page, found)
        self._data(page[place:])

    def text(self) -> str:
        return "".join(self._parts)

    def _markup(self, page: str, start: int) -> int:
        """Takes what begins with "<" at `start`; where it ends."""
        if page.startswith("<!--", start):
            return _COMMENT.match(page, start).end()
        if bogus := _BOGUS.match(page, start):
            return bogus.end()
        tag = _NAME.match(page, start)
        if not tag:
            self._data("<")
            return start + 1
        last = next((found for found in _IN_TAG.finditer(page, tag.end()) if found[0] == ">"), None)
        if last is None:  # not closed: text, all of it
            self._data(page[start:])
            return len(page)
        name, closed = tag[2].lower(), page[last.start() - 1] == "/"
        if tag[1]:
            self._end(name)
        else:
            self._start(name, closed)
        if name in _RAW and not tag[1] and not closed:
            end = _RAW[name].search(page, last.end())
            return end.start() if end else len(page)
        return last.end()

    def _start(self, tag: str, closed: bool) -> None:
        if tag in _DROPPED:
            if not closed:
                self._dropped = self._dropped or tag
        elif tag == "br":
            self._breaks += 1  # two of them are a paragraph
        else:
            self._block(tag)
        self._preformatted += tag == "pre" and not closed

    def _end(self, tag: str) -> None:
        if tag == self._dropped:
            self._dropped = ""
        self._preformatted -= tag == "pre" and self._preformatted > 0
        if tag != "br":
            self._block(tag)

    def _data(self, data: str) -> None:
        if self._dropped or not data:
            return
        data = html.unescape(_HUGE.sub("\ufffd", data))
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
