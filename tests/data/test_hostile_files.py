"""Files made to break a reader or fill its memory end in one line of error, within bounded memory."""

import contextlib
import gzip
import io
import itertools
import json
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genai_fast import data
from genai_fast.data import DataError, DataWarning, picture, reading, text
from genai_fast.data.archive import Archive
from genai_fast.data.errors import brief, printable
from genai_fast.data.pickles import DataUnpickler
from genai_fast.data.text import html_page

resource = pytest.importorskip("resource")


@pytest.fixture(autouse=True)
def bounded(monkeypatch, tmp_path_factory):
    """One GiB more than the process has, as addresses; and a small bound on what packed data may become."""
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(reading, "_ALWAYS", 1 << 20)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def assert_refused(load, source, message):
    with pytest.raises(DataError, match=message) as error:
        load(source)
    said = str(error.value)
    assert "\n" not in said and len(said) < 2100 and said == printable(said) and "remedy" in said


def png(width=4, height=4, **options):
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG", **options)
    return file.getvalue()


def zipped(path, members, method=zipfile.ZIP_DEFLATED):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there already
        with zipfile.ZipFile(path, "w", method) as file:
            for name, content in members:
                file.writestr(name, content)
    return path


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text, body=b""):
    text = text.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def patched(raw, *edits):
    """A zip file whose last directory entry has other bytes at offsets from its beginning."""
    raw = bytearray(raw)
    start = raw.rindex(b"PK\x01\x02")
    for offset, content in edits:
        raw[start + offset : start + offset + len(content)] = content
    return bytes(raw)


ARRAY = zipped(io.BytesIO(), [("images.npy", npy(np.zeros((2, 3, 3), np.uint8)))]).getvalue()
SHAPE = "{'descr': '|u1', 'fortran_order': False, 'shape': %s}"
HOSTILE_ARRAYS = {
    "npz encrypted": ("x.npz", patched(ARRAY, (8, b"\x01")), "an encrypted file"),
    "npz method": ("x.npz", patched(ARRAY, (10, b"\x63")), "compression method 99"),
    "npz version": ("x.npz", patched(ARRAY, (6, b"\xff")), "zip file version"),
    "npz size": ("x.npz", patched(ARRAY, (24, struct.pack("<I", 1 << 30))), "that unpack to"),
    "npz smaller": ("x.npz", patched(ARRAY, (24, struct.pack("<I", 9))), "size or check sum is not as stated"),
    "npz offset": ("x.npz", patched(ARRAY, (42, struct.pack("<I", 7))), "no file where"),
    "npz no npy": ("x.npz", zipped(io.BytesIO(), [("images", b"no array")]).getvalue(), "an array named images"),
    "npz not npy": ("x.npz", zipped(io.BytesIO(), [("images.npy", b"no array")]).getvalue(), "NumPy file"),
    "npz lzma": ("x.npz", zipped(io.BytesIO(), [("images.npy", b"x" * 99)], zipfile.ZIP_LZMA).getvalue(), "NumPy"),
    "npz names": ("x.npz", zipped(io.BytesIO(), [(f"a{k}\x1b", b"") for k in range(999)]).getvalue(), "named images"),
    "npy 784 TiB": ("x.npy", header(SHAPE % "(862032232939520,)"), "bytes for shape"),
    "npy negative": ("x.npy", header(SHAPE % "(-1, 3, 3)", b"x" * 9), "bytes for shape"),
    "npy overflow": ("x.npy", header(SHAPE % "(4294967296, 4294967296, 1)"), "bytes for shape"),
    "npy nested": ("x.npy", header("(" * 9000), "NumPy file"),
    "npy long": ("x.npy", header(" " * 60000), "NumPy file"),
    "npy version": ("x.npy", b"\x93NUMPY\x07\x00aaaa", "version"),
    "npy no sizes": ("x.npy", header("{'descr': '|V0', 'fortran_order': False, 'shape': (9,)}"), "an array of"),
    "npy fields": ("x.npy", npy(np.zeros((2, 3, 3), [("a", "u1")])), "expected uint8"),
    "idx 2**64": ("x", struct.pack(">4B3I", 0, 0, 8, 3, 1 << 31, 1 << 31, 4), "bytes as its header says"),
    "idx 2**96": ("x", struct.pack(">4B3I", 0, 0, 8, 3, *[0xFFFFFFFF] * 3), "bytes as its header says"),
    "idx gz bomb": ("x.gz", gzip.compress(bytes(1 << 25)), "that unpack to"),
    "idx gz many": ("x.gz", gzip.compress(bytes(1 << 20)) * 64, "that unpack to"),
    "idx gz damaged": ("x.gz", gzip.compress(bytes(99))[:-9] + b"x" * 9, "expected an IDX file"),
    "cifar odd": ("x.bin", b"x" * 100, "3073 bytes an image"),
}


@pytest.mark.parametrize("case", HOSTILE_ARRAYS)
def test_arrays(tmp_path, case):
    name, content, message = HOSTILE_ARRAYS[case]
    (tmp_path / name).write_bytes(content)
    assert_refused(data.load, tmp_path / name, message)


def test_only_the_arrays_asked_for_are_read(tmp_path):
    images = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    members = [("images.npy", npy(images)), ("features.npy", npy(np.zeros(1 << 26, np.uint8))), ("x.npy", b"broken")]
    found = data.load(zipped(tmp_path / "a.npz", members))
    assert np.array_equal(found.pixels[:, 0].numpy(), images)
    assert_refused(data.load, zipped(tmp_path / "b.npz", [("images.npy", members[1][1])]), "that unpack to")


def nested(depth, first, pair):
    """A pickle of containers, each of which holds the one before it twice: 2 ** depth items to visit."""
    memo = [bytes([k]) for k in range(depth + 1)]
    levels = [b"0" + pair % (b"h" + a, b"h" + a) + b"q" + b for a, b in itertools.pairwise(memo)]
    return first + b"q\x00" + b"".join(levels)


def nested_lists(depth):
    return nested(depth, b"]", b"](%s%se")


def entries(*items):
    return b"\x80\x02}(" + b"".join(items) + b"u."


def named(value):
    return b"X" + struct.pack("<I", len(value)) + value


DATA = b"".join([named(b"data"), b"]"])
PICKLES = {
    "labels": (entries(DATA, named(b"labels"), nested_lists(60)), "expected an array of bytes"),
    "key": (entries(nested(60, b"K\x01", b"%s%s\x86"), b"K\x01"), "tuples in tuples"),
    "wide key": (entries(b"(" + b"K\x01" * 2000 + b"tq\x00(" + b"h\x00" * 2000 + b"t", b"K\x01"), "tuples in tuples"),
    "memo": (entries(b"K\x01r\xff\xff\xff\x7f", b"K\x01"), "with data, got 1"),
    "bytes": (b"\x80\x04}(" + b"\x8e" + struct.pack("<Q", 1 << 60), "expected a CIFAR-10 batch"),
    "bytearray": (b"\x80\x05}(" + b"\x96" + struct.pack("<Q", 1 << 40), "expected a CIFAR-10 batch"),
    "depth": (b"\x80\x02" + b"]" * 100_000 + b"." + b"a" * 100_000, "with data, got list"),
    "number": (entries(b"L" + b"9" * 10_000 + b"L\n", b"K\x01"), "expected a CIFAR-10 batch"),
    "persistent": (b"\x80\x02Px\n.", "expected a CIFAR-10 batch"),
    "empty": (b"", "expected a CIFAR-10 batch"),
    "names": (entries(*[named(b"\x1b[31m%d" % k) + b"K\x01" for k in range(999)]), r"got \\x1b\[31m0"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles(tmp_path, case):
    content, message = PICKLES[case]
    (tmp_path / "data_batch_1").write_bytes(content)
    assert_refused(data.load, tmp_path, message)


def test_labels_of_nested_lists_are_not_written_out(tmp_path):
    pixels = pickle.dumps(np.zeros((1, 3072), np.uint8), protocol=2)[2:-1]
    content = entries(named(b"data"), pixels, named(b"labels"), nested_lists(60))
    (tmp_path / "data_batch_1").write_bytes(content)
    assert_refused(data.load, tmp_path, "expected 1 labels, integers, got list of")


@pytest.mark.parametrize("names", ["one name", 5, {"a": 1}, [1, 2], []])
def test_class_names_that_are_none(tmp_path, names):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]}))
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    assert_refused(data.load, tmp_path, "expected the names of the classes")


def test_pickled_containers_are_what_they_were():
    value = {"a": (1, (2, [3, ()])), (1, 2): {frozenset([(4, 5)])}, "b": bytearray(b"xyz"), "c": (None,)}
    assert DataUnpickler(pickle.dumps(value, 5)).load() == value
    del value[1, 2], value["b"]  # earlier protocols call for them
    for protocol in range(6):
        assert DataUnpickler(pickle.dumps(value, protocol)).load() == value


METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@pytest.mark.parametrize("method", METHODS)
def test_zip_files_unpack_to_what_they_state(tmp_path, method):
    content = os.urandom(1000) + bytes(9000)
    path = zipped(tmp_path / "a.zip", [("a", content), ("b", b""), ("c", b"x")], method)
    archive = Archive(path, lambda name: True)
    assert [archive.read(name) for name in archive.names] == [content, b"", b"x"]
    archive.close()
    (tmp_path / "b.zip").write_bytes(b"a program before it" * 99 + path.read_bytes())
    assert Archive(tmp_path / "b.zip", "a".__eq__).read("a") == content
    raw = zipped(io.BytesIO(), [("a", bytes(1 << 22))], method).getvalue()
    (tmp_path / "c.zip").write_bytes(patched(raw, (24, struct.pack("<I", 1000))))
    with pytest.raises((ValueError, zlib.error, EOFError), match="not as stated"):
        Archive(tmp_path / "c.zip", lambda name: True).read("a")


TEXT_ZIPS = {
    "bomb": (lambda path: zipped(path, [("a.txt", b"a" * (1 << 25))]), "that unpack to"),
    "many": (lambda path: zipped(path, [(f"{k}.txt", b"a" * (1 << 19)) for k in range(9)]), "that unpack to"),
    "encrypted": (lambda path: path.write_bytes(patched(TEXT, (8, b"\1"))), r"a\.txt: expected text, got an encrypted"),
    "lzma": (lambda path: path.write_bytes(LZMA[:40] + b"\xff" * 9 + LZMA[49:]), r"a\.txt: expected text, got"),
    "method": (lambda path: path.write_bytes(patched(TEXT, (10, b"\x13"))), "compression method 19"),
    "version": (
        lambda path: path.write_bytes(patched(TEXT, (6, b"\xff"))),
        "expected a zip file, got zip file version",
    ),
    "directory": (lambda path: path.write_bytes(TEXT[:-22] + b"PK\5\6" + b"\xff" * 18), "expected a zip file"),
}
TEXT = zipped(io.BytesIO(), [("a.txt", b"some text" * 9)]).getvalue()
LZMA = zipped(io.BytesIO(), [("a.txt", os.urandom(99))], zipfile.ZIP_LZMA).getvalue()


@pytest.mark.parametrize("case", TEXT_ZIPS)
def test_zip_files_of_text(tmp_path, case):
    make, message = TEXT_ZIPS[case]
    make(tmp_path / "a.zip")
    assert_refused(text.load, tmp_path / "a.zip", message)


def test_other_files_in_a_zip_do_not_count(tmp_path):
    path = zipped(tmp_path / "a.zip", [("a.txt", b"text"), ("video.mp4", bytes(1 << 25))])
    assert text.load(path).documents == ["text"]


def test_of_files_of_one_name_in_a_zip_the_last_counts(tmp_path):
    members = [("a.txt", "old text"), ("a.txt", "new text"), ("b.txt", "other"), ("./b.txt", "other too")]
    assert text.load(zipped(tmp_path / "a.zip", members)).documents == ["new text", "other too"]
    large = png(4, 4)
    members = [("a.png", large), ("a.png", large), ("b\\c.png", png(2, 2)), ("./b/c.png", large), ("c/d.png", png())]
    members = [(f"a/{name.removeprefix('b/')}" if name == "a.png" else name, content) for name, content in members]
    assert data.load(zipped(tmp_path / "b.zip", members)).labels.tolist() == [0, 1, 2]


def test_a_link_in_a_zip_is_no_text(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        info = zipfile.ZipInfo("passwd.txt")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
        file.writestr("a.txt", "text")
    assert text.load(tmp_path / "a.zip").documents == ["text"]


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_only_regular_files_are_read(tmp_path, kind):
    (tmp_path / "whole.txt").write_text("whole")
    for name in ("a.txt", "a.png", "a.npy", "a.npz", "a.zip", "x", "data_batch_1", "tokenizer.json", "a.po"):
        if kind == "device":
            (tmp_path / name).symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(tmp_path / name)
        else:
            os.mknod(tmp_path / name, 0o140600)
    with pytest.warns(DataWarning, match=r"a\.txt \(expected text, got "):
        assert text.load(tmp_path).documents == ["whole"]
    for name in ("a.npy", "a.npz", "a.zip", "x"):
        assert_refused(data.load, tmp_path / name, r"expected .*, got (a named pipe|a device|No such device)")
    for name in ("a.txt", "a.zip", "a.po"):
        for load in (text.load, text.load_pairs):
            assert_refused(load, tmp_path / name, "got (a named pipe|a device|No such device)")
    assert_refused(text.read_tokenizer, tmp_path / "tokenizer.json", "got (a named pipe|a device|No such device)")
    assert_refused(data.load, tmp_path, "expected pictures")
    with pytest.raises(DataError, match=r"a\.png: expected a picture, got (a named pipe|a device|No such device)"):
        picture.read_light(tmp_path / "a.png", 4, 4)


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "", "a\x1b[31m", "/dev/null/x"], ids=ascii)
def test_paths_that_are_none(source):
    for load in (data.load, text.load, text.load_pairs):
        if source or load is data.load:
            with pytest.raises(DataError) as error:
                load(source)
            assert "\x1b" not in str(error.value) and "\n" not in str(error.value)


BOMBS = {
    "one colour": (png(13_300, 13_300, compress_level=9), "13300 x 13300 pixels in"),
    "beyond": (png(1, 1)[:16] + struct.pack(">II", 1 << 30, 1 << 30) + png(1, 1)[24:], "expected a picture"),
    "jpeg": (b"\xff\xd8\xff\xc0\x00\x0b\x08\xff\xff\xff\xff\x01\x01\x11\x00\xff\xd9", "expected a picture"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "no format that Pillow knows"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_pictures_far_larger_than_their_files(tmp_path, case):
    content, message = BOMBS[case]
    for k in range(4):
        (tmp_path / f"{k}.png").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert_refused(data.load, tmp_path, message)
        assert_refused(lambda source: data.load(source, 8), tmp_path, message)
        bare = message.replace("expected a ", "")
        assert_refused(lambda source: picture.read_light(source / "0.png", 8, 8), tmp_path, bare)


def test_large_pictures_are_decoded_one_after_the_other(monkeypatch, tmp_path):
    monkeypatch.setattr(picture, "_PIXELS", 100)
    for k in range(40):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (16, 16), np.uint8)).save(tmp_path / f"{k}.png")
    assert len(data.load(tmp_path, cache=False)) == 40 and picture._room._taken == 0


PAGES = {
    "comments": "<!--" * 20_000,
    "sections": "<![x[" * 20_000,
    "instructions": "<?x" * 20_000,
    "tags": "<a " * 30_000,
    "values": '<a b="' * 30_000,
    "values of two kinds": "<a b='c\">" * 30_000,
    "ends": "</a " * 30_000,
    "dropped": "<template>" * 10_000 + "</style>" * 10_000,
    "scripts": "<script>" * 20_000,
    "number": f"&#{'9' * 80_000};",
    "hexadecimal": f"&#x{'f' * 80_000};",
    "marks": "a" + "\u0301\u0323" * 40_000,
    "spaces": f"<p>a{' ' * 80_000}b",
}


@pytest.mark.parametrize("case", PAGES)
def test_pages_take_no_longer_than_their_length(tmp_path, case):
    """Each took seconds to minutes when time grew with the square of the length; the suite's patience would end."""
    (tmp_path / "a.html").write_text(PAGES[case] + "<p>end", encoding="utf-8")
    (tmp_path / "b.html").write_text("<p>whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        assert text.load(tmp_path).documents[-1] == "whole"


def test_markup_that_is_not_closed():
    assert html_page.text_of("1 < 2 and a<b") == "1 < 2 and a<b"
    assert html_page.text_of("<p title='a > b'>x</p ><P\ntitle=\"a'>b\">y") == "x\n\ny"
    assert html_page.text_of("a<!-- b --!>c<!-->d<!--->e<!-- f > g") == "acde"
    assert html_page.text_of("a<script>if (a < b) '</p>' </scripty> </SCRIPT >b<style/>c") == "abc"
    assert html_page.text_of("a<template><noscript>b</noscript>c</template>d") == "ad"
    assert html_page.text_of("<pre>\n a&lt;b\n</pre>") == "\n a<b\n"


CATALOGUES = {
    "quotes": 'msgid "a"\nmsgstr "' + '\\"' * 40_000,
    "strings": 'msgid "a"\nmsgstr ' + '"" ' * 40_000 + "x",
    "back slashes": 'msgid "a"\nmsgstr ' + '"\\' * 40_000,
}


@pytest.mark.parametrize("case", CATALOGUES)
def test_catalogues_take_no_longer_than_their_length(tmp_path, case):
    (tmp_path / "a.po").write_text(CATALOGUES[case])
    assert_refused(text.load_pairs, tmp_path / "a.po", "expected a catalogue's msgid, msgstr or string")


ESCAPES = {
    "utf-8": ("UTF-8", r"caf\303\251", "café"),
    "hexadecimal": ("UTF-8", r"caf\xc3\xa9", "café"),
    "beside characters": ("UTF-8", r"é \303\251 ü", "é é ü"),
    "over two strings": ("UTF-8", 'caf\\303"\n"\\251', "café"),
    "latin": ("ISO-8859-1", r"caf\351", "café"),
    "shift-jis": ("Shift_JIS", r"\203A", "ア"),
    "none named": ("CHARSET", r"caf\303\251", "café"),
    "hostile name": ("idna", r"caf\303\251", "café"),
    "half": ("UTF-8", r"caf\303", "caf\ufffd"),
    "ascii": ("UTF-8", r"\101\x42\n\060", "AB\n0"),
    "beyond a byte": ("UTF-8", r"a\777b", "a\ufffdb"),
}


@pytest.mark.parametrize("case", ESCAPES)
def test_escapes_in_catalogues_are_bytes(tmp_path, case):
    charset, string, expected = ESCAPES[case]
    head = f'msgid ""\nmsgstr "Content-Type: text/plain; charset={charset}\\n"\n\n'
    (tmp_path / "a.po").write_text(f'{head}msgid "a"\nmsgstr "{string}"\n', encoding="utf-8")
    assert text.load_pairs(tmp_path / "a.po").pairs == [("a", expected)]


@pytest.mark.parametrize("charset", ["idna", "punycode", "unicode_escape", "utf-7", "hz", "rot13", "zlib", "undefined"])
def test_encodings_that_are_none_of_text(tmp_path, charset):
    (tmp_path / "a.html").write_bytes(b'<meta charset="%s">a \xe9 \\n +AGE- .' % charset.encode())
    (tmp_path / "b.txt").write_text("whole")
    with pytest.warns(DataWarning, match="1 byte became U"):
        assert text.load(tmp_path).documents == ["a \ufffd \\n +AGE- .", "whole"]
    head = b'msgid ""\nmsgstr "charset=%s"\n\nmsgid "a"\nmsgstr "\xe9"\n' % charset.encode()
    (tmp_path / "a.po").write_bytes(head)
    with pytest.warns(DataWarning, match="1 byte became U"):
        assert text.load_pairs(tmp_path / "a.po").pairs == [("a", "\ufffd")]


def test_what_a_parser_raises_leaves_out_that_file_alone(tmp_path, monkeypatch):
    (tmp_path / "a.html").write_text("<p>bad")
    (tmp_path / "b.html").write_text("<p>good")
    real = html_page.text_of

    def text_of(page):
        if "bad" in page:
            raise RecursionError
        return real(page)

    monkeypatch.setattr(html_page, "text_of", text_of)
    with pytest.warns(DataWarning, match=r"left out 1 .*a\.html \(expected text, got too deep a nesting"):
        assert text.load(tmp_path).documents == ["good"]
    with pytest.raises(DataError, match=r"a\.html: expected text, got too deep a nesting"):
        text.load(tmp_path, strict=True)


def test_hostile_lines_of_json(tmp_path):
    lines = ["[" * 100_000, "9" * 10_000, json.dumps({"\x1b[31m\n" * 999: 1, **{str(k): 0 for k in range(9999)}}), "{}"]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": "good"}']))
    with pytest.warns(DataWarning) as said:
        assert text.load(tmp_path / "a.jsonl").documents == ["good"]
    (message,) = {str(one.message) for one in said}
    assert "left out 4 broken" in message and "\x1b" not in message and "\n" not in message and len(message) < 2100


def test_long_runs_of_white_space():
    spaces = " " * 80_000
    assert text.Corpus("x", [f"a{spaces}b{spaces}c"]).split(0.1, 0)[1].documents == ["c"]
    assert text.Corpus("x", [f"a\n{spaces}\n{spaces}b\nc"]).split(0.5, 0)[1].documents[0].strip().startswith("b")
    assert text.Corpus("x", [f"a{spaces}b"]).passages().documents == [f"a{spaces}b"]
    assert text.continuations(text.Corpus("x", [f"a{spaces}b"])).pairs == [("a", "b")]


def test_names_are_safe_to_print(tmp_path):
    evil = "a\x1b[31m\u202e"
    for name in (f"{evil}/a.png", "b/a.png", "b/\x9bbroken.png"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_bytes(b"x" if "broken" in name else png())
    path = zipped(tmp_path / "p.zip", [(f"{evil}/a.png", png()), ("b/a.png", png()), ("b/\x9bbroken.png", b"x")])
    for source in (tmp_path / "p", path):
        with pytest.warns(DataWarning, match=r"b/\\x9bbroken\.png") as said:
            images = data.load(source)
        assert images.classes == (r"a\x1b[31m\u202e", "b") and images.labels.tolist() == [0, 1]
        assert images.skipped == (r"b/\x9bbroken.png",) and "\x9b" not in str(said[0].message)
    with contextlib.suppress(OSError):  # where file names are text
        (tmp_path / "q").mkdir()
        (tmp_path / "q" / os.fsdecode(b"\xff.txt")).write_text("text")
        (tmp_path / "q" / os.fsdecode(b"\xfe.txt")).write_text("")
        with pytest.warns(DataWarning, match=r"\\udcfe\.txt"):
            assert text.load(tmp_path / "q").documents == ["text"]
    assert printable("naïve 東 👩\u200d🚀 \u00a0") == "naïve 東 👩\u200d🚀 \u00a0"
    assert brief([[]] * 9) == "list of 9" and brief("x" * 99) == repr("x" * 40) and brief(10**5000) == "int"
