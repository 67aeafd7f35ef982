"""Tokenizers: lossless, streamed, saved; no text becomes the end."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genai_fast.data import DataError, text
from genai_fast.data.text import tokenizers
from genai_fast.errors import UsageError

SAMPLE = [
    "The quick brown fox jumps over the lazy dog.\nIt doesn't care; 1234 foxes did, in 1999.\n" * 3,
    "Größe, naïveté, 東京, 😀👩‍👩‍👧\n\n  indented   text<|endoftext|>",
]
TOKENIZERS = {kind: text.make_tokenizer(kind, SAMPLE, 300 if kind == "bpe" else None) for kind in tokenizers.KINDS}
ANY = st.text(max_size=40) | st.text("aeTh eßé\n 'st12😀<|>", max_size=40)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return "".join(stream.put(i) for i in ids) + stream.close()


def test_sizes():
    assert [TOKENIZERS[kind].size for kind in ("byte", "bpe")] == [257, 300]
    assert TOKENIZERS["char"].size == len(set("".join(SAMPLE))) + 2
    assert all(t.end == t.size - 1 for t in TOKENIZERS.values())
    assert [t.unknown for t in TOKENIZERS.values()] == [None, TOKENIZERS["char"].size - 2, None]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@settings(max_examples=60, deadline=None)
@given(ANY)
def test_any_text_comes_back(kind, sample):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(sample)
    assert tokenizer.decode(ids) == sample and all(0 <= i < tokenizer.end for i in ids)


@settings(max_examples=60, deadline=None)
@given(ANY)
def test_unknown_characters_are_one_id(sample):
    tokenizer = TOKENIZERS["char"]
    known = set("".join(SAMPLE))
    ids = tokenizer.encode(sample)
    assert len(ids) == len(sample) and tokenizer.end not in ids
    assert [i == tokenizer.unknown for i in ids] == [c not in known for c in sample]
    assert tokenizer.decode(ids) == "".join(c if c in known else "\ufffd" for c in sample)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_stream_is_the_text(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=40))
    decoded = tokenizer.decode(ids)
    assert streamed(tokenizer, ids) == decoded
    if kind != "char":
        table = [bytes([i]) for i in range(256)] if kind == "byte" else tokenizer._table
        assert decoded == b"".join(table[i] for i in ids if i != tokenizer.end).decode("utf-8", "replace")


def test_a_stream_waits_for_whole_characters():
    byte = TOKENIZERS["byte"]
    stream = byte.stream()
    assert [stream.put(i) for i in "é😀a".encode()] == ["", "é", "", "", "", "😀", "a"] and stream.close() == ""
    assert [stream.put(i) for i in (0xE2, 0x82)] == ["", ""] and stream.close() == "\ufffd"
    assert byte.decode([0xFF, 256, 65]) == "\ufffdA"


def test_no_text_becomes_the_end(tokenizer):
    for sample in ("<|endoftext|>", "</s>[SEP]<end>", "\ud800", "\0", str(tokenizer.end), ""):
        ids = tokenizer.encode(sample)
        assert tokenizer.end not in ids
        if tokenizer.kind != "char":
            assert tokenizer.decode(ids) == sample.replace("\ud800", "\ufffd")


def test_ids_that_do_not_exist_are_refused(tokenizer):
    for wrong in (-1, tokenizer.size):
        with pytest.raises(ValueError, match=rf"decode: expected ids from 0 to {tokenizer.size - 1}, got {wrong}"):
            tokenizer.decode([0, wrong])


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    read = text.read_tokenizer(tmp_path / "tokenizer.json")
    assert all(getattr(read, name) == getattr(tokenizer, name) for name in ("kind", "size", "end", "digest"))
    assert all(read.encode(sample) == tokenizer.encode(sample) for sample in [*SAMPLE, "ЯЯ unseen"])
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_digests_tell_tokenizers_apart():
    others = [text.make_tokenizer("bpe", SAMPLE, 290), text.make_tokenizer("char", SAMPLE[:1])]
    digests = {t.digest for t in (*TOKENIZERS.values(), *others)}
    assert len(digests) == 5 and all(len(digest) == 16 for digest in digests)


def test_training_is_the_same_in_another_process():
    code = (
        "from genai_fast.data import text\n"
        "documents = text.load('pydoc').documents[:20]\n"
        "print([text.make_tokenizer(kind, documents, 600).digest for kind in ('char', 'bpe')])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    documents = text.load("pydoc").documents[:20]
    digests = [text.make_tokenizer(kind, documents, 600).digest for kind in ("char", "bpe")]
    assert done.stdout.strip() == str(digests), done.stderr


def test_byte_pairs_make_text_short():
    documents = text.load("pydoc").documents[:40]
    tokenizer = text.make_tokenizer("bpe", documents, 1000)
    assert tokenizer.size == 1000
    assert len(tokenizer.encode(documents[0])) < 0.5 * len(documents[0].encode())
    words = [tokenizer.decode([i]) for i in range(tokenizer.end)]
    assert " the" in words and all(word.strip("\n ").count("\n") == 0 for word in words)


def test_long_texts_are_encoded_in_pieces(monkeypatch):
    tokenizer = TOKENIZERS["bpe"]
    long = "\n".join(SAMPLE * 5) + "\n\n \n x \n\ny" + "\r\nz\n\tw\n" * 9
    whole = [tokenizer.encode(sample) for sample in (long, "", "a")]
    monkeypatch.setattr(tokenizers, "_PIECE", 7)
    monkeypatch.setattr(tokenizers, "_AT_ONCE", 60)
    assert len(list(tokenizers._pieces(long))) > 10
    assert [ids.tolist() for ids in tokenizer.arrays([long, "", "a"])] == whole


def test_a_char_tokenizer_keeps_the_most_frequent():
    tokenizer = text.make_tokenizer("char", ["aaabbc\ufffd", "bdd"], 5)
    assert (tokenizer.characters, tokenizer.size) == ("abd", 5)
    assert tokenizer.decode(tokenizer.encode("abcd\ufffd")) == "ab\ufffdd\ufffd"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("word", ["a"]), "tokenizer: expected byte, char or bpe, got 'word'"),
        (("bpe", ["a"], 256), "expected at least 257 ids for bpe, got 256"),
        (("char", ["a"], 2), "expected at least 3 ids for char, got 2"),
        (("char", []), "expected text to make the char tokenizer from, got none"),
        (("bpe", [""]), "expected text to make the bpe tokenizer from, got none"),
    ],
)
def test_what_makes_no_tokenizer_is_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        text.make_tokenizer(*arguments)


def test_the_missing_package_is_named(monkeypatch, tmp_path):
    TOKENIZERS["bpe"].save(tmp_path / "t.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    read = text.read_tokenizer(tmp_path / "t.json")
    assert read.decode(range(65, 91)) == TOKENIZERS["bpe"].decode(range(65, 91))  # only encoding needs it
    for call in (lambda: text.make_tokenizer("bpe", SAMPLE), lambda: read.encode("a")):
        with pytest.raises(
            UsageError, match=r'remedy: pip install tokenizers, or pip install "\.\[text\]" in the checkout'
        ):
            call()


def saved(kind):
    return TOKENIZERS[kind]._file()


BROKEN = {
    "no json": ("{", "expected a tokenizer's JSON file, got"),
    "a list": ([], r'expected a JSON object of form "genai_fast tokenizer" and kind byte, char, bpe; got list'),
    "another's": ({"model": {}}, "got fields model; remedy: the file that Tokenizer.save wrote"),
    "kind": ({**saved("byte"), "kind": "word"}, "and kind byte"),
    "kind's type": ({**saved("byte"), "kind": ["byte"]}, "and kind byte"),
    "version": ({**saved("byte"), "version": 2}, "expected version 1, got 2; remedy: another genai-fast"),
    "no characters": ({**saved("char"), "characters": 3}, "expected characters as a string, got int '3'"),
    "order": ({**saved("char"), "characters": "ba"}, "different characters in the order of their code points"),
    "twice": ({**saved("char"), "characters": "aa"}, "different characters in the order"),
    "surrogate": ({**saved("char"), "characters": "a\ud800"}, "different characters in the order"),
    "tokens": ({**saved("bpe"), "tokens": "abc"}, "expected tokens as a list of strings"),
    "few tokens": ({**saved("bpe"), "tokens": ["a", "b"]}, "each of its 256 characters as one"),
    "same tokens": ({**saved("bpe"), "tokens": [*saved("bpe")["tokens"], "a"]}, "expected different tokens"),
    "foreign": ({**saved("bpe"), "tokens": [*saved("bpe")["tokens"], "東"]}, "GPT-2's byte alphabet"),
    "merges": ({**saved("bpe"), "merges": [["a"]]}, "expected merges as a list of pairs of strings"),
    "merge": ({**saved("bpe"), "merges": [["z", "z"]]}, "expected merges of tokens to a token, got 'z' and 'z'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(tmp_path, case):
    contents, message = BROKEN[case]
    path = tmp_path / "tokenizer.json"
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    with pytest.raises(DataError, match=message) as error:
        text.read_tokenizer(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"t\.json: expected a tokenizer's file, got No such file"):
        text.read_tokenizer(tmp_path / "t.json")
