"""Documents and pairs in memory, split so that nothing held out is also trained on."""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from genai_fast.data.errors import DataError
from genai_fast.data.text.cleaning import PARAGRAPH, scalars

T = TypeVar("T")
_FAR = 0.5  # a boundary may move the share that is held out by half of it
_MORE = "more text"
_LINES, _WORDS = re.compile(r"(?<!\s)\s*\n"), re.compile(r"\s+")
_WORD = 100  # characters: text whose white space is further apart is not written in words
# After a sentence's end, and the quotes and brackets that close it, of text that may have no white space.
_STOP, _CLOSE = "[。！？｡．…।!?]", "[”’」』）》〉\"')\\]]"  # noqa: RUF001
SENTENCES = re.compile(f"(?:(?<={_STOP})|(?<={_STOP}{_CLOSE}))(?!{_CLOSE}|{_STOP})")
# Thai, Lao, Burmese, Khmer, kana and Chinese characters.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
_JOINERS = "\u200c\u200d\ufe0e\ufe0f"  # and variation selectors: part of the character before them


@dataclass(frozen=True)
class Corpus:
    """Documents, in order; none is empty.

    skipped: what was left out because it is broken or empty: names of files, or of lines as "file:line".
    replaced: undecodable bytes, which became U+FFFD.
    """

    name: str
    documents: list[str]
    skipped: tuple[str, ...] = ()
    replaced: int = 0

    def __len__(self) -> int:
        return len(self.documents)

    def passages(self) -> Corpus:
        """The documents' paragraphs as documents; the lines of a document that has no blank lines."""
        found = []
        for document in self.documents:
            parts = PARAGRAPH.split(document)
            found += (part.rstrip() for part in (parts if len(parts) > 1 else document.split("\n")) if part.strip())
        return replace(self, documents=found)

    def split(self, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
        """(training, validation): about `fraction` is held out, whole documents fixed by the seed, at least one.

        Documents that differ in white space alone fall on the same side. A single document is cut in two near the end:
        between paragraphs if that can be, else lines, else words, else sentences or characters.

        Raises DataError: the documents are all the same, or the only one has a single word.
        """
        if len(self) == 1:
            _check_fraction(fraction)
            return self._cut(fraction)
        keys = map(plain, self.documents)
        kept, held = _held_out(self.name, "documents", self.documents, keys, fraction, seed)
        return replace(self, documents=kept), replace(self, documents=held)

    def _cut(self, fraction: float) -> tuple[Corpus, Corpus]:
        (document,) = self.documents
        wanted = len(document) * (1 - fraction)
        limit = _FAR * min(fraction, 1 - fraction) * len(document)
        for boundary, reach in ((PARAGRAPH, 0), (_LINES, 0), (_WORDS, _WORD), (SENTENCES, 0)):
            spots = [found.span() for found in boundary.finditer(document)]
            spots = [spot for spot in spots if spot[0] > 0 and spot[1] < len(document)]
            if spots:
                first, second = min(spots, key=lambda span: abs(span[1] - wanted))
                if max(first - wanted, wanted - second) <= max(limit, reach):
                    return replace(self, documents=[document[:first]]), replace(self, documents=[document[second:]])
        place = character_cut(document, round(wanted)) if len(document) > _WORD or UNSPACED.search(document) else 0
        if not place:
            raise DataError(f"{self.name}: expected text to hold a part out of, got a single word; remedy: {_MORE}")
        return replace(self, documents=[document[:place]]), replace(self, documents=[document[place:]])

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the documents in their order; about 1 GB/s the first time, then kept."""
        return text_digest(self.documents)[:16]


def character_cut(text: str, wanted: int) -> int:
    """The place next to `wanted` that parts no mark from its character; 0 if there is none."""
    place = min(max(wanted, 1), len(text) - 1)
    while place < len(text) and (
        unicodedata.combining(text[place]) or text[place] in _JOINERS or text[place - 1] == "\u200d"
    ):
        place += 1
    return place if place < len(text) else 0


def text_digest(texts: Iterable[str]) -> str:
    """SHA-256 of texts and of where each ends."""
    digest = hashlib.sha256()
    for text in texts:
        raw = scalars(text).encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


@dataclass(frozen=True)
class PairCorpus:
    """Pairs (source, target), in order; neither is empty. The other fields are as in Corpus."""

    name: str
    pairs: list[tuple[str, str]]
    skipped: tuple[str, ...] = ()
    replaced: int = 0

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def documents(self) -> list[str]:
        """Every source and every target once, in order: what a tokenizer is made from."""
        return list(dict.fromkeys(side for pair in self.pairs for side in pair))

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the pairs in their order; about 1 GB/s the first time, then kept."""
        return text_digest(side for pair in self.pairs for side in pair)[:16]

    def split(self, fraction: float, seed: int) -> tuple[PairCorpus, PairCorpus]:
        """(training, validation), as Corpus.split; a source that stands in several pairs falls on one side.

        Raises DataError: all sources are the same.
        """
        keys = (plain(source) for source, _ in self.pairs)
        kept, held = _held_out(self.name, "sources", self.pairs, keys, fraction, seed)
        return replace(self, pairs=kept), replace(self, pairs=held)


def plain(text: str) -> str:
    """Text without its layout: one space for all white space."""
    return " ".join(text.split())


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise DataError(f"fraction: expected more than 0 and less than 1 to hold out, got {fraction:g}")


def _held_out(
    name: str, what: str, items: list[T], keys: Iterable[str], fraction: float, seed: int
) -> tuple[list[T], list[T]]:
    """(kept, held out) of items with these keys: equal keys on one side, about `fraction` of all held out."""
    _check_fraction(fraction)
    numbers: dict[str, int] = {}
    group = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    if len(numbers) < 2:
        raise DataError(
            f"{name}: expected at least two different {what} to hold one out, got {len(numbers)}; remedy: {_MORE}"
        )
    # Groups in random order until there is enough; the last one never.
    order = np.random.default_rng(seed).permutation(len(numbers))
    total = np.cumsum(np.bincount(group)[order])
    taken = 1 + int(np.searchsorted(total[:-1], round(fraction * len(group))))
    chosen = np.zeros(len(numbers), bool)
    chosen[order[: min(taken, len(numbers) - 1)]] = True
    sides: tuple[list[T], list[T]] = ([], [])
    for item, held in zip(items, chosen[group].tolist(), strict=True):
        sides[held].append(item)
    return sides
