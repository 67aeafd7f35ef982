"""Where pairs of texts come from: catalogues of translations, tables, JSON lines, and text to be continued."""

import re
from collections.abc import Iterator
from pathlib import Path

from genai_fast.data.errors import DataError
from genai_fast.data.text import catalogue
from genai_fast.data.text.cleaning import UnreadableError, clean, decode
from genai_fast.data.text.corpus import SENTENCES, UNSPACED, Corpus, PairCorpus, character_cut
from genai_fast.data.text.files import Files, Findings, open_source, records
from genai_fast.data.text.sources import PYDOC, PYDOC_0_1, SUFFIXES, load

_PO, _TSV, _JSON = ".po", ".tsv", ".jsonl"
_FIELD = re.compile(r'"(text|source|target)"\s*:')
_SPACE = re.compile(r"\s+")


def load_pairs(source: str | Path, *, strict: bool = False) -> PairCorpus:
    """Read pairs (source, target), each side in the form that `clean` gives it.

    Args:
        source: one of
            .po: gettext's catalogues; fuzzy, obsolete and untranslated messages are left out (see
            catalogue.translations);
            .tsv: two columns, source and target, as they stand: no header, no quotes;
            .jsonl: a pair a line, fields "source" and "target" of its object;
            a folder with such files in it or below it, in the order of their paths, or a .zip file of such;
            else any source of `load`: each passage of two words or more is cut at the white space next to its middle
            (a passage of a script without white space, after the sentence or the character there), and its first part
            is the source of the rest. This is for pre-training on text alone.
        strict: as in `load`.

    Raises DataError: the source is missing, or nothing in it serves.
    """
    if str(source) in (PYDOC, PYDOC_0_1):
        return continuations(load(source, strict=strict))
    files = open_source(source, (*SUFFIXES, _PO, _TSV), f"{PYDOC} or ")
    files.names = [name for name in files.names if _has_pairs(files, name)]
    if not files.names:
        return continuations(load(source, strict=strict))
    findings = Findings(files, strict)
    pairs: list[tuple[str, str]] = []
    for name, text in findings.texts(lambda name, raw: catalogue.charset(raw) if _is(_PO, name) else ""):
        found, before = len(pairs), len(findings.left_out)
        with findings.reading(name):
            pairs += _pairs(name, text, findings)
        if (found, before) == (len(pairs), len(findings.left_out)):
            findings.leave_out(name, "expected pairs of texts, got none")
    findings.close(len(pairs), "pairs of texts")
    return PairCorpus(files.path.name, pairs, findings.skipped, findings.replaced)


def continuations(corpus: Corpus) -> PairCorpus:
    """(first part, rest) of each passage of two words or more, cut at the white space next to its middle.

    Raises DataError: there is no such passage.
    """
    pairs = []
    for passage in map(str.strip, corpus.passages().documents):
        spots = [match.span() for match in _SPACE.finditer(passage)]
        if not spots and UNSPACED.search(passage):
            spots = [match.span() for match in SENTENCES.finditer(passage) if match.end() < len(passage)]
            place = character_cut(passage, len(passage) // 2)
            spots = spots or ([(place, place)] if place else [])
        if spots:
            first, second = min(spots, key=lambda span: abs(sum(span) - len(passage)))
            pairs.append((passage[:first], passage[second:]))
    if not pairs:
        raise DataError(f"{corpus.name}: expected passages of two words or more, got none; remedy: another source")
    return PairCorpus(corpus.name, pairs, corpus.skipped, corpus.replaced)


def _is(suffix: str, name: str) -> bool:
    return name.lower().endswith(suffix)


def _has_pairs(files: Files, name: str) -> bool:
    if not _is(_JSON, name):
        return _is(_PO, name) or _is(_TSV, name)
    try:
        text = decode(files.read(name)).text
    except UnreadableError:
        return False  # reading it reports that
    # The first line may be anything, a licence for example; the first one that has a field of either kind decides.
    found = _FIELD.search(text)
    if found is None:
        return True
    line = text[text.rfind("\n", 0, found.start()) + 1 :].partition("\n")[0]
    return set(_FIELD.findall(line)) != {"text"}


def _pairs(name: str, text: str, findings: Findings) -> Iterator[tuple[str, str]]:
    if _is(_JSON, name):
        yield from records(name, text, ("source", "target"), findings)
    elif _is(_PO, name):
        for pair in list(catalogue.translations(text)):  # nothing of a file that is broken
            source, target = map(clean, pair)
            if source and target:
                yield source, target
    else:
        for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
            columns = [clean(column) for column in line.split("\t")]
            if len(columns) == 2 and all(columns):
                yield columns[0], columns[1]
            elif line.strip():
                problem = "expected text in both columns, got none in one"
                if len(columns) != 2:
                    problem = f"expected two columns with a tab between them, got {len(columns)}"
                findings.leave_out(f"{name}:{number}", problem)
