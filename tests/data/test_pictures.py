"""Folders and zip files of real pictures: formats, broken files, and the cache of what was decoded."""

import json
import multiprocessing
import os
import shutil
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from genai_fast import data
from genai_fast.data import DataError, DataWarning, cache, picture


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path_factory):
    """Where pictures are kept."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GENAI_FAST_CACHE", str(folder))
    return folder / "images"


@pytest.fixture
def decoded(monkeypatch):
    """The forms of the pictures that were decoded."""
    done, real = [], picture.read_pixels
    monkeypatch.setattr(picture, "read_pixels", lambda file, form, size: done.append(form) or real(file, form, size))
    return done


RAMP = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T], 2)


def put(path, array=RAMP, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


def only(folder, **options):
    """The pixels of a folder's one picture."""
    (x,) = data.load(str(folder), cache=False, **options).pixels.numpy()
    return x


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tiff", "webp", "pgm"])
def test_grey_pictures_keep_their_values(tmp_path, suffix):
    put(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    x = only(tmp_path)
    assert np.array_equal(x[0], RAMP) and all(np.array_equal(x[0], c) for c in x)


def test_jpegs_of_grey_colour_and_ink(tmp_path):
    put(tmp_path / "grey" / "a.jpg", quality=100)
    put(tmp_path / "colour" / "a.jpeg", COLOURS, quality=100, subsampling=0)
    put(tmp_path / "ink" / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=100)
    assert np.abs(only(tmp_path / "grey")[0].astype(int) - RAMP).max() <= 4
    assert np.abs(only(tmp_path / "colour").astype(int) - COLOURS.transpose(2, 0, 1)).max() <= 12
    red = only(tmp_path / "ink")[:, 8, 8]
    assert red[0] > 200 and red[1:].max() < 60


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    deep = np.array([[0, 128, 129, 257], [300, 32768, 65406, 65535]], np.uint16)
    put(tmp_path / f"a.{suffix}", deep)
    assert only(tmp_path).tolist() == [[[0, 0, 1, 1], [1, 128, 254, 255]]]
    whole = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    put(tmp_path / f"a.{suffix}", whole)
    assert np.array_equal(only(tmp_path)[0], (whole.astype(np.uint32) + 128) // 257)


def test_floats_from_0_to_1_are_scaled_and_others_refused(tmp_path):
    put(tmp_path / "a.tiff", np.array([[0, 0.5, 1]], np.float32))
    assert only(tmp_path).tolist() == [[[0, 128, 255]]]
    put(tmp_path / "a.tiff", np.array([[0, 0.5, 255]], np.float32))
    with pytest.raises(DataError, match="values from 0 to 255, where 0 to 1 are expected"):
        only(tmp_path)


def test_alpha_is_dropped_over_white(tmp_path):
    alpha = np.zeros((16, 16), np.uint8)
    alpha[:, 8:] = 255
    put(tmp_path / "rgba" / "a.png", np.dstack([COLOURS, alpha]))
    put(tmp_path / "la" / "a.png", Image.fromarray(np.dstack([RAMP, alpha]), "LA"))
    half = Image.fromarray(np.array([[[0, 128]]], np.uint8), "LA")
    put(tmp_path / "half" / "a.png", half)
    for name, expected in (("rgba", COLOURS.transpose(2, 0, 1)), ("la", RAMP[None])):
        x = only(tmp_path / name)
        assert x.shape == expected.shape and (x[:, :, :8] == 255).all()
        assert np.array_equal(x[:, :, 8:], expected[:, :, 8:])
    assert only(tmp_path / "half").item() == 127


@pytest.mark.parametrize("transparent", [None, 1])
def test_palettes(tmp_path, transparent):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    put(tmp_path / "a.png", image, **({} if transparent is None else {"transparency": transparent}))
    second = [0, 255, 0] if transparent is None else [255, 255, 255]
    assert only(tmp_path)[:, 0].T.tolist() == [[255, 0, 0], second, [10, 20, 30]]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_stand_upright(tmp_path, suffix, orientation):
    wide = np.zeros((16, 32), np.uint8)
    wide[:8, :16] = 255  # the corner that the camera's sensor saw first
    exif = Image.Exif()
    exif[0x0112] = orientation
    put(tmp_path / f"a.{suffix}", wide, exif=exif)
    turned = {1: wide, 3: np.rot90(wide, 2), 6: np.rot90(wide, -1), 8: np.rot90(wide)}[orientation]
    x = only(tmp_path)[0]
    assert x.shape == turned.shape and np.abs(x.astype(int) - turned).max() < 8


def test_size_takes_the_centre_square(tmp_path):
    wide = np.zeros((64, 192), np.uint8)
    wide[:, 64:128] = 200
    put(tmp_path / "a" / "a.png", wide)
    put(tmp_path / "b" / "a.jpg", np.tile(wide, (16, 16))[:1024, : 1024 * 3], quality=95)
    x = only(tmp_path / "a", size=16)
    assert x.shape == (1, 16, 16) and (x[0, :, 2:-2] == 200).all()
    with Image.open(tmp_path / "b" / "a.jpg") as whole:  # what decoding at a fraction of the size may not change
        from PIL import ImageOps

        expected = np.asarray(ImageOps.fit(whole, (32, 32))).astype(int)
    assert np.abs(only(tmp_path / "b", size=32)[0].astype(int) - expected).max() <= 8
    with pytest.raises(DataError, match="size: expected at least 1 pixel, got 0"):
        data.load(str(tmp_path / "a"), size=0)


def test_one_picture_in_colour_makes_all_three_channels(tmp_path):
    put(tmp_path / "a.png", RAMP)
    put(tmp_path / "b.png", COLOURS)
    x = data.load(str(tmp_path)).pixels.numpy()
    assert np.array_equal(x[0], np.stack([RAMP] * 3)) and np.array_equal(x[1], COLOURS.transpose(2, 0, 1))


def test_content_counts_not_the_name(tmp_path):
    put(tmp_path / "a.png", RAMP)
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EOF\n")
    with pytest.raises(DataError, match=r"b\.png: expected a picture, got no format that Pillow knows; 1 of 2"):
        data.load(str(tmp_path), strict=True)


def numbered(folder, count=5, start=0):
    for k in range(count):
        put(folder / f"{k:02}.png", np.full((4, 6), start + k, np.uint8))


def zipped(path, names, folder):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for k, name in enumerate(names):
            file.write(put(folder / "one.png", np.full((4, 6), k, np.uint8)), name)
    return path


@pytest.mark.parametrize("top", ["", "top/"])
def test_zip_files_flat_and_by_class(tmp_path, top):
    hidden = ["__MACOSX/._a.png", f"{top}.b.png", f"{top}cat/deep/er/a.png"]
    flat = data.load(zipped(tmp_path / "flat.zip", [f"{top}b.png", f"{top}a.PNG", "__MACOSX/._a.png"], tmp_path))
    names = [f"{top}{name}" for name in ("dog/a.png", "cat/b.png", "cat/a.png")]
    classes = data.load(zipped(tmp_path / "classes.zip", names + hidden, tmp_path))
    assert flat.labels is None and flat.pixels[:, 0, 0, 0].tolist() == [1, 0]
    assert classes.classes == ("cat", "dog") and classes.labels.tolist() == [0, 0, 1]
    assert classes.pixels[:, 0, 0, 0].tolist() == [2, 1, 0] and classes.shape == (1, 4, 6)


def test_zip_files_that_do_not_serve(tmp_path):
    good = zipped(tmp_path / "good.zip", ["a.png", "b.png"], tmp_path)
    (tmp_path / "cut.zip").write_bytes(good.read_bytes()[:-30])
    (tmp_path / "no.zip").write_bytes(b"no zip at all")
    zipped(tmp_path / "none.zip", ["readme.txt"], tmp_path)
    for name, message in (("cut", "expected a zip file"), ("no", "expected a zip file"), ("none", "got none")):
        with pytest.raises(DataError, match=rf"{name}\.zip: expected .*{message.removeprefix('expected ')}"):
            data.load(tmp_path / f"{name}.zip")
    damaged = bytearray(good.read_bytes())
    damaged[45] ^= 255  # in the first picture: its check sum is wrong
    (tmp_path / "damaged.zip").write_bytes(damaged)
    with pytest.warns(DataWarning, match=r"damaged\.zip: 1 of 2 pictures are broken and left out: a\.png"):
        images = data.load(tmp_path / "damaged.zip")
    assert images.skipped == ("a.png",) and images.pixels[:, 0, 0, 0].tolist() == [1]


def break_some(folder):
    whole = (folder / "04.png").read_bytes()
    (folder / "00.png").write_bytes(b"")
    (folder / "02.png").write_bytes(whole[:-25])  # header well, pixels cut
    (folder / "03.png").write_bytes(b"GIF89a")
    (folder / "05.jpg").write_bytes(b"\xff\xd8\xff\xe0")


@pytest.mark.parametrize("options", [{}, {"cache": False}, {"size": 4}], ids=str)
def test_broken_pictures_are_left_out_named_and_counted_once(tmp_path, options):
    numbered(tmp_path / "b", 5)
    numbered(tmp_path / "a", 2, start=100)
    break_some(tmp_path / "b")
    for _ in range(2):  # decoded, then from the cache
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            images = data.load(str(tmp_path), **options)
        (one,) = said
        assert one.category is DataWarning
        message = str(one.message)
        assert "4 of 8 pictures are broken" in message and "b/00.png (" in message and "b/03.png (" in message
        assert "05.jpg" not in message and ", ...; remedy: " in message
        assert images.skipped == ("b/00.png", "b/02.png", "b/03.png", "b/05.jpg")
        assert images.pixels[:, 0, 0, 0].tolist() == [100, 101, 1, 4] and images.labels.tolist() == [0, 0, 1, 1]
        with pytest.raises(DataError, match=r"b/00\.png: expected a picture, got .*; 4 of 8 files are broken; remedy"):
            data.load(str(tmp_path), strict=True, **options)


def test_nothing_but_broken_pictures(tmp_path, kept):
    for name in ("a.png", "b.png"):
        whole = put(tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"a\.png: expected a picture, got .*; 2 of 2 files are broken"):
        data.load(str(tmp_path))
    assert not list(kept.iterdir())


def test_a_broken_picture_has_no_size(tmp_path):
    whole = put(tmp_path / "a.png", np.zeros((90, 90), np.uint8) + RAMP[0, 5]).read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:60])
    numbered(tmp_path, 3)
    with pytest.warns(DataWarning, match=r"1 of 4 pictures .* a\.png"):
        assert data.load(str(tmp_path)).shape == (1, 4, 6)
    put(tmp_path / "b.png", np.zeros((7, 5), np.uint8))
    with pytest.raises(DataError, match=r"b\.png: expected 6 x 4 pixels as 00\.png has, got 5 x 7; remedy: --size"):
        data.load(str(tmp_path))


def test_a_folder_is_decoded_once(tmp_path, kept, decoded):
    numbered(tmp_path / "x", 7)
    first = data.load(str(tmp_path / "x"))
    assert len(decoded) == 7
    second = data.load(str(tmp_path / "x"))
    assert len(decoded) == 7 and torch.equal(first.pixels, second.pixels)
    second.pixels.zero_()  # a private map: the file stays
    assert torch.equal(data.load(str(tmp_path / "x")).pixels, first.pixels)
    assert data.load(str(tmp_path / "x"), size=3).shape == (1, 3, 3) and len(decoded) == 14
    assert len(list(kept.iterdir())) == 2
    data.load(str(tmp_path / "x"), cache=False)
    data.load(str(tmp_path / "x"), cache=tmp_path / "elsewhere")
    assert len(decoded) == 28 and len(list((tmp_path / "elsewhere").iterdir())) == 1


def rewrite(folder):
    put(folder / "00.png", np.full((4, 6), 77, np.uint8))
    os.utime(folder / "00.png", ns=(1, 1))


CHANGES = {
    "rewritten": rewrite,
    "one more": lambda folder: put(folder / "99.png", np.full((4, 6), 77, np.uint8)),
    "one less": lambda folder: (folder / "00.png").unlink(),
    "renamed": lambda folder: (folder / "00.png").rename(folder / "98.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_pictures_replace_what_was_kept(tmp_path, kept, change):
    numbered(tmp_path, 3)
    data.load(str(tmp_path))
    data.load(str(tmp_path), size=2)
    CHANGES[change](tmp_path)
    expected = data.load(str(tmp_path), cache=False).pixels
    assert torch.equal(data.load(str(tmp_path)).pixels, expected)
    assert len(list(kept.iterdir())) == 2  # the other size's stays


def truncate(entry):
    os.truncate(entry / "pixels.npy", 140)


def edit(entry):
    meta = json.loads((entry / "meta.json").read_text())
    (entry / "meta.json").write_text(json.dumps({**meta, "version": cache.VERSION + 1}))


DAMAGE = {
    "truncated": truncate,
    "another version": edit,
    "no json": lambda entry: (entry / "meta.json").write_text("{"),
    "no meta": lambda entry: (entry / "meta.json").unlink(),
    "no pixels": lambda entry: (entry / "pixels.npy").unlink(),
    "other pixels": lambda entry: np.save(entry / "pixels.npy", np.zeros((3, 1, 6, 4), np.uint8)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entries_are_made_anew(tmp_path, kept, decoded, damage):
    numbered(tmp_path, 3)
    expected = data.load(str(tmp_path)).pixels.clone()
    (entry,) = kept.iterdir()
    DAMAGE[damage](entry)
    assert torch.equal(data.load(str(tmp_path)).pixels, expected) and len(decoded) == 6
    assert torch.equal(data.load(str(tmp_path)).pixels, expected) and len(decoded) == 6
    assert list(kept.iterdir()) == [entry]


def test_what_a_killed_process_left_goes_after_a_day(tmp_path, kept):
    numbered(tmp_path, 2)
    name = f".{'0' * 24}-{'1' * 24}.17"
    for end, age in (("old", 2 * 24 * 3600), ("new", 0)):
        (kept / f"{name}.{end}").mkdir(parents=True)
        (kept / f"{name}.{end}" / "pixels.npy").write_bytes(b"x")
        os.utime(kept / f"{name}.{end}", (time.time() - age,) * 2)
    data.load(str(tmp_path))
    assert {p.name for p in kept.glob(".*")} == {f"{name}.new"}


def test_what_else_lies_in_the_folder_stays(tmp_path):
    numbered(tmp_path / "pictures", 2)
    for name in (".git", "old", f"{'0' * 24}-{'1' * 24}"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    data.load(str(tmp_path / "pictures"), cache=tmp_path)
    assert {".git", "old", f"{'0' * 24}-{'1' * 24}"} < {path.name for path in tmp_path.iterdir()}


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, kept, monkeypatch):
    numbered(tmp_path, 3)
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("a file where a folder should be")
    with pytest.warns(DataWarning, match="cannot be written: .*; pictures are decoded to memory"):
        assert len(data.load(str(tmp_path))) == 3
    kept.unlink()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.warns(DataWarning, match="No space left on device"):
        assert len(data.load(str(tmp_path))) == 3
    assert not list(kept.iterdir())


def _load(folder, barrier, results):
    barrier.wait()
    results.put(int(data.load(folder).pixels.long().sum()))


def test_processes_at_once(tmp_path, kept):
    numbered(tmp_path, 40)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_load, args=(str(tmp_path), barrier, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    sums = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert sums == [sum(range(40)) * 24] * 3 and len(list(kept.iterdir())) == 1


def test_subsets_share_the_mapped_file(tmp_path):
    numbered(tmp_path, 10)
    images = data.load(str(tmp_path))
    train, held_out = images.split(0.3, seed=0)
    again = train.subset(torch.tensor([4, 0]))
    assert train.stored is images.stored is held_out.stored is again.stored
    assert again.pixels[:, 0, 0, 0].tolist() == [train.pixels[k, 0, 0, 0].item() for k in (4, 0)]
    assert torch.equal(again.batch(slice(None)), train.batch(torch.tensor([4, 0])))
    shutil.rmtree(tmp_path)  # the pictures are not needed any more
    assert len(train.batch(slice(0, 7))) == 7
