"""How pictures are turned, which of a folder's or a zip's pictures count, and what the cache of them is worth."""

import io
import json
import os
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from genai_fast import data
from genai_fast.data import DataError, DataWarning, text


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path_factory):
    """The folder of caches."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GENAI_FAST_CACHE", str(folder))
    return folder


WIDE = np.zeros((48, 64), np.uint8)
WIDE[:24, :32] = 255  # the corner that the camera saw first
TURNED = {
    1: WIDE,
    2: WIDE[:, ::-1],
    3: WIDE[::-1, ::-1],
    4: WIDE[::-1],
    5: WIDE.T,
    6: np.rot90(WIDE, -1),
    7: WIDE[::-1, ::-1].T,
    8: np.rot90(WIDE),
}


def saved(kind, **options):
    file = io.BytesIO()
    Image.fromarray(WIDE).convert("RGB").save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(kind, body, behind):
    """A PNG with one more chunk before its pixels or behind them."""
    whole = saved("PNG")
    place = whole.index(b"IEND") - 4 if behind else 33
    return whole[:place] + chunk(kind, body) + whole[place:]


def profile(orientation):
    """As ImageMagick writes it."""
    digits = exif(orientation).hex()
    lines = [digits[k : k + 72] for k in range(0, len(digits), 72)]
    return "\n".join(["", "exif", f"{len(digits) // 2:8}", *lines, ""]).encode()


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
NAME = b"Raw profile type exif\0"
TAGGED = {
    "jpeg": lambda k: saved("JPEG", quality=100, exif=exif(k)),
    "jpeg xmp": lambda k: saved("JPEG", quality=100, xmp=XMP % k),
    "tiff": lambda k: saved("TIFF", exif=exif(k)),
    "webp": lambda k: saved("WEBP", lossless=True, exif=exif(k)),
    **{
        f"png {name} {behind}": lambda k, kind=kind, body=body, behind=behind: png(kind, body(k), behind)
        for behind in (False, True)
        for name, kind, body in (
            ("eXIf", b"eXIf", lambda k: exif(k)[6:]),
            ("text", b"tEXt", lambda k: NAME + profile(k)),
            ("packed text", b"zTXt", lambda k: NAME + b"\0" + zlib.compress(profile(k))),
        )
    },
}


@pytest.mark.parametrize(
    ("kind", "orientation"), [(kind, k) for kind in TAGGED for k in (0, *TURNED, 9, 255) if k < 10 or "xmp" not in kind]
)
def test_pictures_are_upright_as_their_tags_say(tmp_path, kind, orientation):
    (tmp_path / "a.png").write_bytes(TAGGED[kind](orientation))
    expected = TURNED.get(orientation, WIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = data.load(tmp_path).pixels[0].numpy().astype(int)
    assert x.shape == (3, *expected.shape) and np.abs(x - expected).max() < 12
    small = data.load(tmp_path, size=16).pixels[0, 0].numpy().astype(int)
    side = min(expected.shape)
    top, left = ((n - side) // 2 for n in expected.shape)
    square = Image.fromarray(np.ascontiguousarray(expected[top : top + side, left : left + side])).resize((16, 16))
    assert np.abs(small - np.asarray(square)).max() < 40


TEXT_TAG = b"II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, 2, 4, b"six\0", 0)
GARBAGE = {
    "webp": lambda: saved("WEBP", lossless=True, exif=b"garbage" * 3),
    "jpeg": lambda: saved("JPEG", quality=100, exif=b"Exif\0\0garbage" * 3),
    "png eXIf": lambda: png(b"eXIf", b"garbage", False),
    "png eXIf behind": lambda: png(b"eXIf", b"", True),
    "png text": lambda: png(b"tEXt", NAME + b"\nexif\n 9\nxyz", False),
    "png text behind": lambda: png(b"tEXt", NAME + b"xyz", True),
    "png packed text behind": lambda: png(b"zTXt", NAME + b"\0xyz", True),
    "tag of another type": lambda: saved("JPEG", quality=100, exif=b"Exif\0\0" + TEXT_TAG),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_tags_that_cannot_be_read_are_as_none(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(GARBAGE[kind]())
    x = data.load(tmp_path, strict=True).pixels[0].numpy().astype(int)
    assert x.shape == (3, *WIDE.shape) and np.abs(x - WIDE).max() < 12


def value(k):
    file = io.BytesIO()
    Image.new("L", (4, 4), k).save(file, "PNG")
    return file.getvalue()


def made(tmp_path, names, form):
    """Pictures of value 0, 1, ... by name, in a folder or a zip file."""
    if form == "zip":
        tmp_path.mkdir(exist_ok=True)
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            for k, name in enumerate(names):
                file.writestr(name, value(k))
        return tmp_path / "a.zip"
    for k, name in enumerate(names):
        path = tmp_path / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value(k))
    return tmp_path / "a"


def found(images):
    labels = None if images.labels is None else [images.classes[k] for k in images.labels]
    return images.pixels[:, 0, 0, 0].tolist(), labels


CLASSES = ([0, 1, 2], ["cats", "cats", "dogs"])
SPELLINGS = {
    "back slashes": [r"cats\a.png", r"cats\b.png", r"dogs\c.png"],
    "dots": ["./cats/a.png", "./cats/b.png", "./dogs/c.png"],
    "dots and back slashes": [r".\cats\a.png", r".\cats\.\b.png", r".\dogs\c.png"],
    "above": ["../cats/a.png", "../cats/b.png", "x/../dogs/c.png"],
    "absolute": ["/cats/a.png", "//cats//b.png", "/dogs/c.png"],
    "drive": [r"C:\cats\a.png", r"C:\cats\b.png", r"C:\dogs\c.png"],
    "mixed": [r"top\cats/a.png", "top/cats/b.png", r"./top\dogs\c.png"],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_paths_in_a_zip_however_spelt(tmp_path, spelling):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(data.load(made(tmp_path, SPELLINGS[spelling], "zip"))) == CLASSES


@pytest.mark.parametrize("form", ["zip", "folder"])
@pytest.mark.parametrize("under", ["", "top/", "top/images/train/"])
def test_classes_below_folders_that_hold_nothing_else(tmp_path, form, under):
    names = [under + name for name in ("cats/a.png", "cats/b.png", "dogs/c.png")]
    if under == "top/" and form == "folder":
        names.append("top/.hidden.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(data.load(made(tmp_path, names, form))) == CLASSES


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_what_was_flat_or_of_one_class_still_is(tmp_path, form):
    assert found(data.load(made(tmp_path, ["a.png", "b.png"], form))) == ([0, 1], None)
    one = data.load(made(tmp_path / "one", ["cats/a.png", "cats/b.png"], form))
    assert found(one) == ([0, 1], None if form == "zip" else ["cats", "cats"])
    nested = data.load(made(tmp_path / "nested", ["top/cats/a.png", "top/cats/b.png"], form))
    assert found(nested) == ([0, 1], ["cats", "cats"])


@pytest.mark.parametrize("form", ["zip", "folder"])
@pytest.mark.parametrize("stray", ["preview.png", "cats/deeper/x.png", "others/deeper/x.png"])
def test_a_stray_picture_is_named_and_takes_no_classes_away(tmp_path, form, stray):
    source = made(tmp_path, ["cats/a.png", "cats/b.png", "dogs/c.png", stray], form)
    for _ in range(2):  # decoded, then from the cache
        with pytest.warns(DataWarning, match=rf"1 pictures .*, such as {stray}, and are left out") as said:
            assert found(data.load(source)) == CLASSES
        assert len(said) == 1
    with pytest.raises(DataError, match=f"such as {stray}; remedy: move or remove"):
        data.load(source, strict=True)


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_pictures_mostly_beside_folders_have_no_classes(tmp_path, form):
    source = made(tmp_path, ["a.png", "b.png", "c.png", "x/d.png", "y/e.png"], form)
    with pytest.warns(DataWarning, match="3 pictures are next to its subfolders, so there are no classes"):
        assert found(data.load(source)) == ([0, 1, 2, 3, 4], None)


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_folders_of_folders_of_classes_are_asked_for_one(tmp_path, form):
    source = made(tmp_path, ["train/cats/a.png", "train/dogs/b.png", "test/cats/c.png"], form)
    with pytest.raises(DataError, match=r"got them deeper, such as test/cats/c\.png; remedy: one of its folders"):
        data.load(source)


def test_links_to_folders_end(tmp_path):
    source = made(tmp_path, ["cats/a.png", "cats/b.png", "dogs/c.png"], "folder")
    (source / "cats" / "again").symlink_to(source)
    (source / "birds").symlink_to(source / "dogs")
    assert found(data.load(source)) == ([2, 0, 1, 2], ["birds", "cats", "cats", "dogs"])


def tree(tmp_path):
    return made(tmp_path, ["cats/a.png", "cats/b.png", "dogs/c.png"], "folder")


def flip(path, offset=-1):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def rewrite(change):
    def to(entry):
        meta = json.loads((entry / "meta.json").read_text())
        change(meta)
        (entry / "meta.json").write_text(json.dumps(meta))

    return to


def pipe(entry):
    (entry / "meta.json").unlink()
    os.mkfifo(entry / "meta.json")


DAMAGE = {
    "flipped": lambda entry: flip(next(entry.glob("[pi]*.npy"))),
    "about": rewrite(lambda meta: meta["about"].clear()),
    "about's type": rewrite(lambda meta: meta.update(about=[])),
    "no about": rewrite(lambda meta: meta.pop("about")),
    "no arrays": rewrite(lambda meta: meta["arrays"].clear()),
    "arrays' type": rewrite(lambda meta: meta.update(arrays=3)),
    "no digest": rewrite(lambda meta: [form.pop("digest") for form in meta["arrays"].values()]),
    "broken's names": rewrite(lambda meta: meta["about"].update(broken={"none": "x"}, unknown="x")),
    "nested": lambda entry: (entry / "meta.json").write_text("[" * 100_000),
    "pipe": pipe,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_damaged_entries_are_noticed_and_made_again(tmp_path, kept, kind, damage):
    documents, tokenizer = ["some text", "more"], text.make_tokenizer("byte", [])
    source = tree(tmp_path)

    def loaded():
        if kind == "images":
            return data.load(source).pixels.numpy()
        return text.pack(documents, tokenizer).ids

    expected = np.array(loaded())
    (entry,) = (kept / kind).iterdir()
    DAMAGE[damage](entry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert np.array_equal(loaded(), expected)
    assert [path.name for path in (kept / kind).iterdir()] == [entry.name]
    assert (entry / "meta.json").is_file()


def test_ids_beyond_the_tokenizers_are_not_taken(tmp_path, kept):
    """As someone with the folder could put them there, check sum and all."""
    from genai_fast.data.images import array_digest

    tokenizer = text.make_tokenizer("byte", [])
    expected = np.array(text.pack(["text"], tokenizer).ids)
    (entry,) = (kept / "tokens").iterdir()
    ids = np.load(entry / "ids.npy")
    ids[0] = 65_312
    np.save(entry / "ids.npy", ids)
    rewrite(lambda meta: meta["arrays"]["ids"].update(digest=array_digest(ids)))(entry)
    assert np.array_equal(text.pack(["text"], tokenizer).ids, expected)


def test_a_link_in_the_place_of_an_entry_is_not_written_through(tmp_path, kept):
    source = tree(tmp_path)
    data.load(source)
    (entry,) = (kept / "images").iterdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("precious")
    entry.rename(tmp_path / "gone")
    entry.symlink_to(tmp_path / "elsewhere")
    assert len(data.load(source)) == 3
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["precious"]
    assert [path.name for path in (kept / "images").iterdir()] == [entry.name] and not entry.is_symlink()


def test_digests_are_of_what_is_there(tmp_path):
    source = tree(tmp_path)
    first, second = data.load(source), data.load(source, cache=False)
    assert first.content and not second.content and first.digest == second.digest == data.load(source).digest
    assert len(first.digest) == 16 and int(first.digest, 16) >= 0
    (tmp_path / "copy").mkdir()
    assert data.load(tree(tmp_path / "copy")).digest == first.digest  # the place does not count
    half = first.subset(torch.tensor([0, 1]))
    assert len({first.digest, half.digest, first.subset(torch.tensor([1, 0])).digest, first.resized(2).digest}) == 4
    train, held_out = data.load("digits").split(0.1, 0)
    assert train.digest == data.load("digits").split(0.1, 0)[0].digest != held_out.digest
    arrays = {"images": np.zeros((4, 3, 3), np.uint8), "labels": np.arange(4)}
    seen = set()
    for change in ("none", "pixel", "label", "type", "shape"):
        changed = {key: array.copy() for key, array in arrays.items()}
        if change == "pixel":
            changed["images"][3, 2, 2] = 1
        elif change == "label":
            changed["labels"] = changed["labels"][::-1]
        elif change == "type":
            changed["images"] = changed["images"].astype(np.float32)
        elif change == "shape":
            changed["images"] = changed["images"].reshape(4, 1, 9)
        np.savez(tmp_path / "a.npz", **changed)
        seen.add(data.load(tmp_path / "a.npz").digest)
    assert len(seen) == 5


def test_digests_of_text():
    corpora = [["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], ["ab", "c", ""]]
    digests = {text.Corpus("x", documents).digest for documents in corpora}
    assert len(digests) == 5 and text.Corpus("y", ["ab", "c"]).digest in digests
    pairs = [[("a", "b"), ("c", "d")], [("a", "d"), ("c", "b")], [("ab", ""), ("c", "d")]]
    assert len({text.PairCorpus("x", found).digest for found in pairs}) == 3
