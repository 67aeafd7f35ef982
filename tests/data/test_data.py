"""Images: real packages, real files, broken files."""

import gzip
import importlib.util
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from genai_fast import data
from genai_fast.data import DataError
from genai_fast.errors import UsageError


def nearest_centroid_accuracy(images: data.Images) -> float:
    train, test = images.split(0.2, seed=0)
    x, y = train.batch(slice(None)).flatten(1), test.batch(slice(None)).flatten(1)
    centres = torch.stack([x[train.labels == k].mean(0) for k in range(10)])
    return (torch.cdist(y, centres).argmin(1) == test.labels).float().mean().item()


@pytest.mark.parametrize(("name", "shape", "count"), [("mnist", (1, 28, 28), 5000), ("digits", (1, 8, 8), 1797)])
def test_packaged_digits_are_real(name, shape, count):
    images = data.load(name)
    assert (images.shape, len(images)) == (shape, count)
    assert images.labels.unique().tolist() == list(range(10)) and images.classes == tuple("0123456789")
    x = images.batch(slice(None))
    assert x.dtype == torch.float32 and x.is_contiguous() and x.min() == 0 and x.max() == 1
    assert nearest_centroid_accuracy(images) > 0.75  # labels belong to their pixels


@pytest.mark.parametrize("name", ["mnist", "digits"])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UsageError, match=r'pip install \S+, or pip install "\.\[data\]"'):
        data.load(name)


def test_split_is_a_partition_that_the_seed_decides():
    images = data.load("digits")
    images = data.Images("numbers", torch.arange(100.0).view(100, 1, 1, 1), images.labels[:100])
    train, held_out = images.split(0.13, seed=3)
    assert (len(train), len(held_out)) == (87, 13)
    both = torch.cat([train.pixels, held_out.pixels]).flatten()
    assert both.sort().values.tolist() == list(range(100))
    for part in (train, held_out):
        assert torch.equal(part.labels, images.labels[part.pixels.flatten().long()])
    assert torch.equal(images.split(0.13, seed=3)[1].pixels, held_out.pixels)
    assert not torch.equal(images.split(0.13, seed=4)[1].pixels, held_out.pixels)


def test_epochs_are_permutations_of_seed_and_epoch():
    orders = {(s, e): tuple(data.epoch_order(50, s, e).tolist()) for s in (0, 1, 2**32 - 1) for e in range(4)}
    assert len(set(orders.values())) == len(orders)
    assert all(sorted(o) == list(range(50)) for o in orders.values())
    assert orders[1, 2] == tuple(data.epoch_order(50, 1, 2).tolist())


def test_an_epoch_goes_on_in_its_middle():
    images = data.load("digits")
    straight = list(data.batches(images, 500, seed=5, epoch=2))
    assert [len(x) for (x,) in straight] == [500, 500, 500, 297]
    rest = list(data.batches(images, 500, seed=5, epoch=2, start=2))
    assert len(rest) == 2 and all(torch.equal(a, b) for (a,), (b,) in zip(straight[2:], rest, strict=True))


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 6, 5), dtype=np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 3


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_with_the_labels_beside_them(tmp_path, suffix):
    pack = gzip.compress if suffix else bytes
    (tmp_path / f"train-images-idx3-ubyte{suffix}").write_bytes(pack(idx(PIXELS)))
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(LABELS)))
    images = data.load(str(tmp_path / f"train-images-idx3-ubyte{suffix}"))
    assert torch.equal(images.pixels[:, 0], torch.from_numpy(PIXELS))
    assert images.labels.tolist() == LABELS.tolist() and images.classes == ("0", "1", "2")
    torch.testing.assert_close(images.batch(slice(0, 2))[:, 0], torch.from_numpy(PIXELS[:2]) / 255)


@pytest.mark.parametrize(("dash", "suffix"), [("-", ".gz"), (".", "")])  # as their authors name them, and Kaggle
def test_a_folder_of_idx_files_is_its_training_images(tmp_path, dash, suffix):
    pack = gzip.compress if suffix else bytes
    for part, count in (("t10k", 4), ("train", 12)):
        (tmp_path / f"{part}-images{dash}idx3-ubyte{suffix}").write_bytes(pack(idx(PIXELS[:count])))
        (tmp_path / f"{part}-labels{dash}idx1-ubyte{suffix}").write_bytes(pack(idx(LABELS[:count])))
    images = data.load(tmp_path)
    assert torch.equal(images.pixels[:, 0], torch.from_numpy(PIXELS)) and images.labels.tolist() == LABELS.tolist()
    for file in tmp_path.glob("train-*"):
        file.unlink()
    assert len(data.load(tmp_path)) == 4


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (PIXELS, (1, 6, 5)),
        (PIXELS[:, None], (1, 6, 5)),
        (np.stack([PIXELS] * 3, 1), (3, 6, 5)),
        (np.stack([PIXELS] * 3, 3), (3, 6, 5)),
        (np.asfortranarray(PIXELS / 255.0), (1, 6, 5)),
    ],
    ids=["NHW", "N1HW", "N3HW", "NHW3", "float64"],
)
def test_numpy_layouts(tmp_path, array, shape):
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", images=array, labels=LABELS)
    single, pair = data.load(str(tmp_path / "a.npy")), data.load(str(tmp_path / "a.npz"))
    assert single.shape == pair.shape == shape and single.labels is None and pair.labels.tolist() == LABELS.tolist()
    torch.testing.assert_close(single.batch(slice(None))[:, -1], torch.from_numpy(PIXELS) / 255)


def picture(path, size=(7, 5), mode="L", value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(path)


def test_folders_flat_and_by_class(tmp_path):
    for i in range(3):
        picture(tmp_path / "flat" / f"{i}.png", value=10 * i)
        picture(tmp_path / "classes" / "cat" / f"{i}.png", mode="RGB", value=10 * i)
        picture(tmp_path / "classes" / "ant" / f"{i}.jpg")
    flat, classes = data.load(str(tmp_path / "flat")), data.load(str(tmp_path / "classes"))
    assert flat.shape == (1, 5, 7) and flat.labels is None and flat.pixels[:, 0, 0, 0].tolist() == [0, 10, 20]
    assert classes.shape == (3, 5, 7) and classes.classes == ("ant", "cat")
    assert classes.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert classes.pixels[5, :, 2, 3].tolist() == [20, 0, 255]


def test_a_folder_of_many_sizes_asks_for_one(tmp_path):
    picture(tmp_path / "a.png", size=(7, 5))
    picture(tmp_path / "b.png", size=(9, 5))
    with pytest.raises(DataError, match=r"b\.png: expected 7 x 5 .* got 9 x 5; remedy: --size"):
        data.load(str(tmp_path))
    assert data.load(str(tmp_path), size=4).pixels.shape == (2, 1, 4, 4)


def write(content):
    return lambda path: path.write_bytes(content)


def save(array):
    def to(path):
        with path.open("wb") as file:  # np.save would add a suffix
            np.save(file, array)

    return to


def save_many(**arrays):
    def to(path):
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return to


BROKEN = {
    "empty": ("x-images", write(b""), "expected IDX images .* got an empty file"),
    "text": ("x.csv", write(b"1,2,3\n"), r"expected IDX images .* got 31 2c 32 2c; remedy"),
    "truncated": ("x-images", write(idx(PIXELS)[:-7]), r"expected \(12, 6, 5\) bytes .* got 353"),
    "truncated gzip": ("x-images.gz", write(gzip.compress(idx(PIXELS))[:-40]), "expected an IDX file"),
    "labels for images": ("x-images", write(idx(LABELS)), "first bytes 00 00 08 03.*got 00 00 08 01"),
    "no images": ("x-images", write(idx(PIXELS[:0])), "expected at least one image"),
    "empty npy": ("x.npy", write(b""), "expected a NumPy file"),
    "pickle": ("x.npy", write(pickle.dumps([1])), "without pickled objects"),
    "objects": ("x.npy", save(np.array([{}, {}])), "without pickled objects"),
    "one image": ("x.npy", save(PIXELS[0]), r"expected images \[N, H, W\].*got \(6, 5\)"),
    "five channels": ("x.npy", save(np.zeros((2, 5, 6, 7), np.uint8)), "with C 1 or 3"),
    "integers": ("x.npy", save(PIXELS.astype(np.int64)), "expected uint8, or floats.*got int64"),
    "range": ("x.npy", save(PIXELS.astype(np.float32)), r"expected floats in \[0, 1\], got 0 to 255"),
    "nan": ("x.npy", save(np.full((2, 3, 3), np.nan)), r"expected floats in \[0, 1\], got nan"),
    "truncated npz": ("x.npz", write(b"PK\x03\x04abc"), "expected a NumPy file"),
    "names": ("x.npz", save_many(pictures=PIXELS), "expected an array named images.*got pictures"),
    "labels": ("x.npz", save_many(images=PIXELS, labels=LABELS[:5]), "expected 12 labels.*got uint8 \\(5,\\)"),
    "broken picture": ("x/a.png", write(b"\x89PNG\r\n\x1a\nabc"), r"a\.png: expected a picture"),
    "no picture": ("x/readme.txt", write(b"hello"), "expected pictures .* got none"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(tmp_path, case):
    name, make, message = BROKEN[case]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    source = path.parent if "/" in name else path
    with pytest.raises(DataError, match=message) as error:
        data.load(str(source))
    assert str(source) in str(error.value)


def test_other_sources_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected mnist, digits or the path .* got no such file"):
        data.load("mnits")
    np.save(tmp_path / "a.npy", PIXELS)
    with pytest.raises(DataError, match="size: expected at least 1 pixel, got 0"):
        data.load(str(tmp_path / "a.npy"), size=0)
    with pytest.raises(DataError, match=r"hold out 0\.01 of them, got 12"):
        data.load(str(tmp_path / "a.npy")).split(0.01, seed=0)


def test_every_source_can_be_resized():
    images = data.load("mnist")
    for side in (56, 14):
        other = data.load("mnist", size=side)
        assert other.shape == (1, side, side) and torch.equal(other.labels, images.labels)
        for k in range(0, 5000, 500):
            expected = Image.fromarray(images.pixels[k, 0].numpy()).resize((side, side), Image.Resampling.BILINEAR)
            difference = other.stored[k, 0].int() - torch.tensor(np.array(expected)).int()
            assert difference.abs().max() <= 1
    assert data.load("digits", size=8).shape == (1, 8, 8) and data.load("digits", size=16).stored.max() <= 1

    wide = torch.zeros(3, 1, 6, 10, dtype=torch.uint8)
    wide[:, :, :, 2:8] = 200  # the centre square
    small = data.Images("wide", wide, torch.arange(3)).subset(torch.tensor([2, 0])).resized(3)
    assert (small.stored == 200).all() and small.stored.shape == (2, 1, 3, 3) and small.labels.tolist() == [2, 0]
