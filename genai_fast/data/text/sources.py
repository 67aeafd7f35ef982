"""Where documents come from: the standard library, text, HTML and JSON lines; files, folders and zip files."""

import importlib
from pathlib import Path

from genai_fast.data.text import html_page
from genai_fast.data.text.cleaning import PARAGRAPH, UnreadableError, clean, unwrapped
from genai_fast.data.text.corpus import Corpus, plain
from genai_fast.data.text.files import Findings, open_source, records

PYDOC = "pydoc"
PYDOC_0_1 = "pydoc-0.1"
_HTML, _JSON = (".html", ".htm"), ".jsonl"
SUFFIXES = (".txt", ".md", *_HTML, _JSON)
_COLUMNS = 70  # of pydoc's lines
_REPEATED = 100  # characters from which on a paragraph that pydoc repeats is no coincidence


def load(source: str | Path, *, strict: bool = False) -> Corpus:
    """Read documents, each in the form that `clean` gives it.

    Args:
        source: one of
            "pydoc": the topics of Python's own help (from the standard library, so they differ a little from version
            to version), one line per paragraph, without tables and the paragraphs that an earlier topic has;
            "pydoc-0.1": the same as version 0.1 read it, lines as they are wrapped there, so that its runs resume;
            .html, .htm: one document of what a reader of the page sees;
            .jsonl: a document a line, field "text" of its object;
            .txt, .md or any other file: one document, the whole of it (`Corpus.passages` gives its paragraphs);
            a folder with .txt, .md, .html, .htm and .jsonl files in it or below it, in the order of their paths, or a
            .zip file of such. Hidden files are left out.
            Files are UTF-8, or UTF-16 and UTF-32 with a byte order mark; HTML that is not may name its encoding.
        strict: a file or a line that is broken or empty, or a byte that cannot be decoded, is an error. Otherwise
            such files and lines are left out, and such bytes become U+FFFD, with a DataWarning for each of the two.

    Raises DataError: the source is missing, or nothing in it serves.
    """
    if str(source) in (PYDOC, PYDOC_0_1):
        return _pydoc(wrapped=str(source) == PYDOC_0_1)
    findings = Findings(open_source(source, SUFFIXES, f"{PYDOC} or "), strict)
    documents: list[str] = []
    for name, text in findings.texts(_charset):
        if name.lower().endswith(_JSON):
            documents += (document for (document,) in records(name, text, ("text",), findings))
            continue
        with findings.reading(name):
            document = clean(html_page.text_of(text) if name.lower().endswith(_HTML) else text)
            if not document:
                raise UnreadableError("expected text, got nothing")
            documents.append(document)
    findings.close(len(documents), "text")
    return Corpus(findings.files.path.name, documents, findings.skipped, findings.replaced)


def _charset(name: str, raw: bytes) -> str:
    return html_page.charset(raw) if name.lower().endswith(_HTML) else ""


def _pydoc(wrapped: bool) -> Corpus:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        paragraphs = []
        topic = topics[name] if wrapped else unwrapped(topics[name], _COLUMNS)
        for paragraph in PARAGRAPH.split(clean(topic)):
            key = plain(paragraph)
            if len(key) < _REPEATED or key not in seen:
                paragraphs.append(paragraph)
            seen.add(key)
        documents.append("\n\n".join(paragraphs))
    return Corpus(PYDOC, documents)
