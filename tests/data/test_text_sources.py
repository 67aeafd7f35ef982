"""Text: real files of all kinds, broken ones, and splits that do not leak."""

import html
import json
import unicodedata
import warnings
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genai_fast.data import DataError, DataWarning, text
from genai_fast.data.text.cleaning import unwrapped
from genai_fast.data.text.html_page import text_of as html_text

TEXTS = st.text(st.characters(), max_size=60)  # surrogates too


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(*records):
    return "".join(f"{json.dumps(record)}\n" for record in records)


def mixed(folder):
    """A folder as people have them."""
    put(folder / "b.txt", "Second file.\r\n\r\nIts end.\n")
    put(folder / "a" / "page.HTML", "<p>A page</p><script>no()</script>")
    put(folder / "a" / "notes.md", "# Notes\n")
    put(folder / "records.jsonl", jsonl({"text": "one", "id": 1}, {"text": "zwei"}))
    put(folder / "empty.txt", " \n")
    put(folder / "broken.txt", bytes(range(256)))
    put(folder / ".hidden.txt", "hidden")
    put(folder / ".git" / "a.txt", "hidden")
    put(folder / "picture.png", b"\x89PNG")
    return folder


def test_pydoc_is_real_and_repeats_nothing():
    corpus = text.load("pydoc")
    assert len(corpus) > 50 and sum(map(len, corpus.documents)) > 300_000 and not corpus.skipped
    assert any(document.startswith('The "assert" statement') for document in corpus.documents)
    long = [" ".join(p.split()) for p in corpus.passages().documents]
    long = [paragraph for paragraph in long if len(paragraph) >= 100]
    assert len(set(long)) == len(long) > 500


def test_pydoc_is_prose_without_rules_in_one_line_per_paragraph():
    documents = text.load("pydoc").documents
    lines = [line.strip() for document in documents for line in document.splitlines()]
    assert not [line for line in lines if len(line) > 2 and set(line) <= set("-=*~+|^ ")]
    assert "Future statements" in lines and max(map(len, lines)) > 500
    (assertion,) = (document for document in documents if document.startswith('The "assert" statement'))
    sentence = "Assert statements are a convenient way to insert debugging assertions into a program:"
    assert f"\n\n{sentence}\n\n   assert_stmt ::=" in assertion


def test_the_pydoc_of_version_0_1_has_its_lines_wrapped_and_the_same_words():
    now, former = text.load("pydoc"), text.load("pydoc-0.1")
    assert former.name == "pydoc" and len(former) == len(now)
    (assertion,) = (document for document in former.documents if document.startswith('The "assert" statement'))
    assert "Assert statements are a convenient way to insert debugging assertions\ninto a program:" in assertion
    assert text.load_pairs("pydoc-0.1").pairs != text.load_pairs("pydoc").pairs


UNWRAPPED = {  # width 20
    "a paragraph": (
        "The words of a line\nthat did not fit.\n\nAnother",
        "The words of a line that did not fit.\n\nAnother",
    ),
    "words that would have fitted": ("Roses are red,\nas violets are blue", None),
    "items": (
        "* an item of a list\n  that continues\n* another item",
        "* an item of a list that continues\n* another item",
    ),
    "numbers": ("12. an item of the\n    list; continued", "12. an item of the list; continued"),
    "code": ("if the_condition_is:\n    do_something_long()", None),
    "another indentation": ("  The words of a line\nthat begins elsewhere", None),
    "a hyphen": ("a long line, double-\nprecision", "a long line, double-precision"),
    "a dash": ("it was long ago --\nand far away", "it was long ago -- and far away"),
    "a title": ("A title of any size\n===================\n\nText", "A title of any size\n\nText"),
    "a table": ("+---+----+\n| a | b  |\n|===|====|\n| 1 | 22 |\n+---+----+\nText", "Text"),
    "marks below a line of code": ("x + y\n~~^~~\nText", "x + y\nText"),
    "dots": ("   >>> x = 1\n   ...", None),
}


@pytest.mark.parametrize("case", UNWRAPPED)
def test_lines_broken_for_their_length_are_joined(case):
    given, expected = UNWRAPPED[case]
    assert unwrapped(given, 20) == (given if expected is None else expected)


def test_a_folder_of_all_kinds(tmp_path):
    folder = mixed(tmp_path / "mixed")
    with pytest.warns(
        DataWarning, match=r"left out 2 .*: broken\.txt \(.*zero bytes\)\), empty\.txt \(.*got nothing\)"
    ):
        corpus = text.load(folder)
    assert corpus.documents == ["# Notes", "A page", "Second file.\n\nIts end.", "one", "zwei"]
    assert (corpus.name, corpus.skipped, corpus.replaced) == ("mixed", ("broken.txt", "empty.txt"), 0)
    with pytest.raises(DataError, match=r"mixed/broken\.txt: expected text, got binary data"):
        text.load(folder, strict=True)
    with zipfile.ZipFile(tmp_path / "mixed.zip", "w") as file:
        for path in folder.rglob("*"):
            file.write(path, path.relative_to(tmp_path))
    with pytest.warns(DataWarning):
        assert text.load(str(tmp_path / "mixed.zip")).documents == corpus.documents


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(tmp_path, encoding):
    path = put(tmp_path / "a.txt", "tëxt \U0001f600\r\nline".encode(encoding))
    assert text.load(path, strict=True).documents == ["tëxt \U0001f600\nline"]


@pytest.mark.parametrize(
    ("content", "found", "replaced", "message"),
    [
        (b"na\xefve caf\xe9", "na\ufffdve caf\ufffd", 2, r"a\.txt: .*; 2 bytes became U\+FFFD, the first at offset 2"),
        (b"\xef\xbb\xbfab\xff", "ab\ufffd", 1, r"; 1 byte became U\+FFFD, the first at offset 5"),
        (b"caf\xc3\xa9 \xe2\x82", "café \ufffd", 2, "; 2 bytes became .* offset 6"),
        ("a\ufffdb".encode() + b"\x80", "a\ufffdb\ufffd", 1, "1 byte became .* offset 5"),
        ("ab".encode("utf-16") + b"c", "ab\ufffd", 1, "1 byte became .* offset 6"),
    ],
)
def test_undecodable_bytes_are_counted_and_named(tmp_path, content, found, replaced, message):
    path = put(tmp_path / "a.txt", content)
    with pytest.warns(DataWarning, match=message) as said:
        corpus = text.load(path)
    assert (corpus.documents, corpus.replaced, len(said)) == ([found], replaced, 1)
    with pytest.raises(DataError, match=r"a\.txt: expected text in UTF-8, got byte 0x.. at offset \d; remedy: save it"):
        text.load(path, strict=True)


def test_html_becomes_what_a_reader_sees(tmp_path):
    page = """<!doctype html><html><head><title>A page</title><style>p {}</style>
    <script>if (a < b) { x("</p>") }</script></head><body><!-- no -->
    <h1>Head &amp; shoulders</h1><p>One <b>bold</b>&nbsp;  word,<br/>a new
    line: <i>it</i>alic &#8364;&lt;tag&gt;</p><pre>
  def f():
      return 1</pre>
    <ul><li>one<li>two</ul><table><tr><td>1</td><td>2</td></tr><tr><td>3</td></tr></table>a<br><br>b<div>c</div>d</p>"""
    corpus = text.load(put(tmp_path / "a.htm", page))
    assert corpus.documents == [
        "A page\n\nHead & shoulders\n\nOne bold word,\na new line: italic €<tag>\n\n  def f():\n      return 1\n\n"
        "one\ntwo\n\n1 2\n3\n\na\n\nb\nc\nd"
    ]
    old = '<html><head><meta http-equiv="Content-Type" content="text/html; charset=ISO-8859-1"><body>caf\xe9 \x93x\x94'
    assert text.load(put(tmp_path / "b.html", old.encode("latin-1")), strict=True).documents == ["café “x”"]
    with pytest.warns(DataWarning, match="offset"):
        odd = text.load(put(tmp_path / "c.html", b'<meta charset="rot13">caf\xe9'))
    assert odd.documents == ["caf\ufffd"]


HTML = [
    *["<", ">", "</", "<!", "<![", "<![x[", "]]>", "<!--", "-->", "&", "&#", ";", "9", "pre", "script", "p", "a"],
    " ",
    "\n",
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(HTML), max_size=30).map("".join))
def test_no_page_is_too_odd(page):
    html_text(page)
    assert html_text(f"<p>A</p>b &lt;{html.escape(page)}").startswith("A\n\nb <")


@settings(max_examples=50, deadline=None)
@given(TEXTS)
def test_clean_text_has_one_form(raw):
    cleaned = text.clean(raw)
    assert text.clean(cleaned) == cleaned == unicodedata.normalize("NFC", cleaned)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n" for c in cleaned)
    assert cleaned == cleaned.rstrip() and not cleaned.startswith("\n")
    cleaned.encode()


def test_clean_keeps_what_it_can():
    assert text.clean("\ufeff\n \n  a\tb\0\r\nc\x85d\re\u2028f\ud800 \n\n") == "  a\tb\nc\nd\ne\nf\ufffd"
    odd = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) in ("Cc", "Cs", "Zl", "Zp")]
    assert len(odd) > 2000 and {text.clean(f"a{c}b") for c in odd} == {"a\tb", "a\nb", "ab", "a\ufffdb"}
    assert text.clean("e\u0301 \u200d\U0001f469") == "é \u200d\U0001f469"


def test_lines_that_are_no_records_are_named(tmp_path):
    lines = ['{"text": "good"}', "{oops", '{"content": "x", "id": 3}', "", "[1]", '{"text": " "}', '{"text": "also"}']
    path = put(tmp_path / "a.jsonl", "\r\n".join(lines))
    with pytest.warns(
        DataWarning, match=r'left out 4 .*a\.jsonl:2 \(expected a JSON object with "text", got Expecting'
    ):
        corpus = text.load(path)
    assert corpus.documents == ["good", "also"]
    assert corpus.skipped == ("a.jsonl:2", "a.jsonl:3", "a.jsonl:5", "a.jsonl:6")
    with pytest.raises(DataError, match=r"a\.jsonl:2: expected a JSON object"):
        text.load(path, strict=True)
    other = put(tmp_path / "b.jsonl", jsonl({"content": "x", "id": 3}, {"content": "y"}))
    with pytest.raises(DataError, match=r'b\.jsonl:1: .* "text" .*, got "content" \(str\), "id" \(int\); all 2 files'):
        text.load(other)


BROKEN = {
    "missing": ("nope", None, "expected pydoc or the path of a file or folder, got no such file"),
    "empty": ("a.txt", b"", "expected text, got nothing"),
    "blank": ("a.html", b"<script>x</script> ", "expected text, got nothing"),
    "binary": ("a.bin", b"PK\0\0\0", "expected text, got binary data"),
    "no text files": ("f/a.png", b"x", r"expected files \(\.txt, \.md, .*\) in it or in its subfolders, got none"),
    "no records": ("a.jsonl", b"\n\n", "expected (text|pairs of texts), got none"),
    "no zip": ("a.zip", b"PK", "expected a zip file"),
    "all empty": ("f/a.txt", b"", r"f/a\.txt: expected text, got nothing"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("load", [text.load, text.load_pairs])
def test_what_holds_no_text_is_refused(tmp_path, case, load):
    name, content, message = BROKEN[case]
    if content is not None:
        put(tmp_path / name, content)
    source = tmp_path / name.partition("/")[0]
    with pytest.raises(DataError, match=message) as error:
        load(source)
    assert str(source) in str(error.value)


CATALOGUE = r"""
# Head.
#, fuzzy
msgid ""
msgstr ""
"Content-Type: text/plain; charset=%s\n"

#: a.py:1
msgid "Hello"
msgstr "Grüße"
#, python-format, fuzzy
msgid "bad"
msgstr "schlecht"

#~ msgid "old"
#~ msgstr "alt"

msgctxt "menu"
msgid "%%d file"
msgid_plural "%%d files"
msgstr[0] "%%d Datei"
msgstr[1] "%%d Dateien"

msgid "one form"
msgid_plural "forms"
msgstr[0] "Formen"

msgid "untranslated"
msgstr ""
#| msgid "before"
msgid ""
"Two \"lines\"\n"
"of\ttext\\"

msgstr "Zwei\n" "\x41\101"
"""


@pytest.mark.parametrize("charset", ["UTF-8", "ISO-8859-1", "CHARSET"])
def test_catalogues(tmp_path, charset):
    raw = (CATALOGUE % charset).encode("latin-1" if charset.startswith("ISO") else "utf-8")
    put(tmp_path / "de" / "a.po", raw)
    put(tmp_path / "de" / "readme.txt", "not this")
    pairs = [
        ("Hello", "Grüße"),
        ("%d file", "%d Datei"),
        ("%d files", "%d Dateien"),
        ("forms", "Formen"),
        ('Two "lines"\nof\ttext\\', "Zwei\nAA"),
    ]
    corpus = text.load_pairs(tmp_path / "de" / "a.po", strict=True)
    assert corpus.pairs == text.load_pairs(tmp_path / "de").pairs == pairs
    assert corpus.documents == [side for pair in pairs for side in pair]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('msgid "a"\nmsgstr "b"\n\nmsgid "c\nmsgstr "d"\n', r"""msgid, msgstr or string, got '"c' in line 4"""),
        ('msgstr "d"\n', "expected each message to begin with one msgid, got msgstr in line 1"),
        ('msgid "d"\nmsgstr "a"\nmsgstr "b"', "got msgstr in line 3"),
        ('msgid "d"\nwhat', "got 'what' in line 2"),
        ('"d"\n', "in line 1"),
        ('msgid "a"\nmsgstr ""\n', "expected pairs of texts, got none"),
    ],
)
def test_broken_catalogues_are_left_out(tmp_path, content, message):
    path = put(tmp_path / "a.po", content)
    with pytest.raises(DataError, match=rf"a\.po: .*{message}"):
        text.load_pairs(path)
    put(tmp_path / "b.po", 'msgid "good"\nmsgstr "gut"\n')
    with pytest.warns(DataWarning, match=message):
        corpus = text.load_pairs(tmp_path)
    assert (corpus.pairs, corpus.skipped) == ([("good", "gut")], ("a.po",))


def test_tables_and_records_of_pairs(tmp_path):
    table = put(tmp_path / "a.tsv", "a b\tc\u2028d\r\nonly\n1\t2\t3\nx\t\n\ny\tz")
    with pytest.warns(DataWarning, match=r"a\.tsv:2 \(.*two columns .* got 1\), a\.tsv:3 \(.* got 3\), .*:4 \(.*both"):
        assert text.load_pairs(table).pairs == [("a b", "c\nd"), ("y", "z")]
    lines = put(tmp_path / "a.jsonl", jsonl({"source": "a", "target": "b"}, {"source": 1, "target": "b"}))
    with pytest.warns(DataWarning, match=r'a\.jsonl:2 \(expected fields "source" and "target" that are strings'):
        assert text.load_pairs(lines).pairs == [("a", "b")]
    other = put(tmp_path / "b.jsonl", jsonl({"src": "a", "tgt": "b"}))
    with pytest.raises(DataError, match=r'"source" and "target" that are strings, got "src" \(str\), "tgt" \(str\)'):
        text.load_pairs(other)


def test_text_goes_on(tmp_path):
    words = put(tmp_path / "a.txt", "One two  three.\n\nword\n\nFour\nfive six seven")
    assert text.load_pairs(words).pairs == [("One two", "three."), ("Four\nfive", "six seven")]
    lines = put(tmp_path / "a.jsonl", jsonl({"text": "a b\nc d"}))
    assert text.load_pairs(lines).pairs == [("a", "b"), ("c", "d")]
    assert len(text.load_pairs("pydoc")) > 1000
    with pytest.raises(DataError, match="expected passages of two words or more, got none"):
        text.load_pairs(put(tmp_path / "b.txt", "word"))


DOCUMENTS = st.lists(st.sampled_from(["a", " a\n", "b c", "b  c", "d", "e", "f", "g"]), min_size=2, max_size=30)


def plain(texts):
    return {" ".join(t.split()) for t in texts}


@settings(max_examples=50, deadline=None)
@given(DOCUMENTS, st.floats(0.01, 0.99), st.integers(0, 5))
def test_nothing_held_out_is_trained_on(documents, fraction, seed):
    pairs = [(source, f"{k}") for k, source in enumerate(documents)]
    if len(plain(documents)) < 2:
        with pytest.raises(DataError, match=r"x: expected at least two different documents to hold one out, got 1"):
            text.Corpus("x", documents).split(fraction, seed)
        return
    train, held_out = text.Corpus("x", documents).split(fraction, seed)
    assert train.documents and held_out.documents and not plain(train.documents) & plain(held_out.documents)
    assert sorted(train.documents + held_out.documents) == sorted(documents)
    assert text.Corpus("x", documents).split(fraction, seed)[1] == held_out
    train, held_out = text.PairCorpus("x", pairs).split(fraction, seed)
    assert train.pairs and held_out.pairs and sorted(train.pairs + held_out.pairs) == sorted(pairs)
    assert not plain(source for source, _ in train.pairs) & plain(source for source, _ in held_out.pairs)


def test_a_split_is_about_as_large_as_asked():
    corpus = text.Corpus("x", [f"document {k}" for k in range(200)])
    assert [len(corpus.split(f, 0)[1]) for f in (0.001, 0.1, 0.5, 0.999)] == [1, 20, 100, 199]
    assert corpus.split(0.1, 0)[1].documents != corpus.split(0.1, 1)[1].documents
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(DataError, match="fraction: expected more than 0 and less than 1"):
            corpus.split(fraction, 0)


@pytest.mark.parametrize(
    ("document", "tail"),
    [
        ("\n\n".join(f"passage {k}\nof lines" for k in range(10)), "passage 8\nof lines\n\npassage 9\nof lines"),
        ("\n".join(f"line {k}" for k in range(10)), "line 8\nline 9"),
        (" ".join(f"word{k}" for k in range(10)), "word8 word9"),
        ("head\n\n" + "\n".join(f"line {k}" for k in range(10)), "line 8\nline 9"),
    ],
    ids=["paragraphs", "lines", "words", "far paragraph"],
)
def test_a_single_document_has_a_held_out_tail(document, tail):
    train, held_out = text.Corpus("x", [document]).split(0.2, 0)
    assert held_out.documents == [tail] and document.startswith(train.documents[0])
    assert "".join((train.documents[0] + tail).split()) == "".join(document.split())
    with pytest.raises(DataError, match="x: expected text to hold a part out of, got a single word"):
        text.Corpus("x", ["word"]).split(0.2, 0)


def test_a_whole_folder_loads_in_silence(tmp_path):
    put(tmp_path / "a.txt", "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text.load(tmp_path).passages().documents == ["a"]


CHINESE = "今天天气很好。我们去公园吧。”你说“好”。"


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "document",
    [
        CHINESE * 500,
        CHINESE.replace("。", "") * 500,
        "a " + CHINESE * 500,  # the one space is far
        "ข้อความภาษาไทยไม่มีช่องว่าง" * 200,
        "ACGT" * 500,
        "👩\u200d🚀" * 500,
        "你好",
    ],
    ids=["sentences", "characters", "one space", "thai", "letters", "joined", "two"],
)
def test_text_without_white_space_is_cut(document, fraction):
    train, held_out = (part.documents[0] for part in text.Corpus("x", [document]).split(fraction, 0))
    assert train + held_out == document and train and held_out
    if len(document) > 10:
        assert abs(len(held_out) / len(document) - fraction) < 0.06
    assert not unicodedata.combining(held_out[0]) and held_out[0] != "\u200d" and train[-1] != "\u200d"
    if document.startswith(CHINESE):
        assert train[-1] in "。”" and held_out[0] not in "。”"


def test_passages_without_white_space_go_on():
    corpus = text.Corpus("x", ["今天天气很好。我们去公园吧。\n天气很好\nword\n好"])
    assert text.continuations(corpus).pairs == [("今天天气很好。", "我们去公园吧。"), ("天气", "很好")]


def test_records_whose_first_line_is_another(tmp_path):
    lines = [{"license": "CC0"}, {"text": "one two"}, {"text": "three four"}]
    path = put(tmp_path / "a.jsonl", jsonl(*lines))
    with pytest.warns(DataWarning, match=r"left out 1 .*a\.jsonl:1 "):
        assert text.load_pairs(path).pairs == [("one", "two"), ("three", "four")]
    lines = [{"license": "CC0"}, {"source": "a", "target": "b", "text": "c"}, {"text": "d e"}]
    path = put(tmp_path / "b.jsonl", jsonl(*lines))
    with pytest.warns(DataWarning, match=r"left out 2 .*b\.jsonl:1 .*b\.jsonl:3 "):
        assert text.load_pairs(path).pairs == [("a", "b")]
    path = put(tmp_path / "c.jsonl", b"\xef\xbb\xbf\n" + jsonl({"text": 'a "source": "b"'}).encode())
    assert text.load_pairs(path).pairs == [('a "source":', '"b"')]
    path = put(tmp_path / "d.jsonl", jsonl({"text": "a b", "source": "c", "target": "d"}))
    assert text.load_pairs(path).pairs == [("c", "d")]
