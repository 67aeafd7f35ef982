"""What users read first is idiomatic English: a list of habits that crept in, each with what to write instead.

It reads the README, the documentation with the files that its pages include, public docstrings and the help of the
command line. If a word is right in its place, make the pattern here narrower.
"""

import inspect
import re
import sys
from pathlib import Path

import pytest

import genai_fast
from genai_fast import layers, ops
from genai_fast.cli.parser import commands_of, parser_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs/_site"))

import site_links  # noqa: E402
import site_pages  # noqa: E402

HABITS = {
    r"behind": "after",
    r"beside": "next to, compared with, in addition to",
    r"where there (is|are)": "if there",
    r"anew": "again",
    r"(goes|go|went) on": "continue",
    r"meanwhile|in the meantime": "at the same time, or nothing",
    r"in vain": "without effect",
    r"mend(s|ed)?": "fix",
    r"(no|some)body|whoever": "users, callers, a process: name the actor",
    r"(?<!there )(is|are) no (?!longer|slower|faster|more|less|larger|smaller|such)\w+": "is not a",
    r"stands(?! for)": "is",
    r"a (\w+ )?\w+ an? (epoch|step|op|layer|machine|row|family|process|call|core|GPU)": "per",
    r"so (many|much)(?! that)": "a given number of, or this many",
    r"(is|are|was|were) (told|said)": "is passed, is reported",
    r"(in|of|by) words": "in plain English",
    r"one's own": "your own",
    r"others than": "different from",
    r"from which size on": "size threshold",
    r"to be had": "available",
    r"comes? of": "comes from",
    r"at choice": "optionally",
    r"and its kin|and the like": "and similar",
    r"by hand": "manually",
}
PATTERN = re.compile("|".join(rf"(?P<h{k}>\b(?:{habit})\b)" for k, habit in enumerate(HABITS)), re.IGNORECASE)


def found(text):
    """(line number, words, what to write instead), code apart."""
    text = re.sub(r"^```.*?^```$|`[^`]+`|\]\([^)]*\)", lambda code: "\n" * code[0].count("\n"), text, flags=re.M | re.S)
    for match in PATTERN.finditer(text):
        better = list(HABITS.values())[int(match.lastgroup[1:])]
        yield text.count("\n", 0, match.start()) + 1, match[0], better


PAGES = site_pages.written().values()
INCLUDED = {
    site_links.repository_path(path, "docs") for page in PAGES for path in site_pages.INCLUDE.findall(page.read_text())
}
READ = ["README.md", *(page.relative_to(ROOT).as_posix() for page in PAGES), *sorted(INCLUDED)]


@pytest.mark.parametrize("path", READ)
def test_pages(path):
    assert [
        f"{path}:{line}: {words!r}; better: {better}" for line, words, better in found((ROOT / path).read_text())
    ] == []


def test_generated_pages():
    texts = site_pages.generated()
    assert [(page, words, better) for page, text in texts.items() for _, words, better in found(text)] == []


def test_public_docstrings():
    public = [getattr(home, name) for home in (genai_fast, ops, layers) for name in home.__all__]
    texts = {thing.__name__: inspect.getdoc(thing) or "" for thing in public if callable(thing)}
    assert len(texts) > 40
    assert [(name, words, better) for name, text in texts.items() for _, words, better in found(text)] == []


def test_help_of_the_command_line():
    helps = {name: parser.format_help() for name, parser in commands_of(parser_of()).items()}
    assert len(helps) > 20
    assert [(name, words, better) for name, text in helps.items() for _, words, better in found(text)] == []


def test_habits_are_found_in_prose_and_not_in_code():
    text = "It goes on behind it. `behind`\n```python\nin vain\n```\nIt is no longer.\n"
    assert [words for _, words, _ in found(text)] == ["goes on", "behind"]
