"""CIFAR-10 as it is distributed, made from real digits; and pickles that are more than data."""

import os
import pickle
import struct

import numpy as np
import pytest
import torch

from genai_fast import data
from genai_fast.data import DataError, cifar


def small(count, start=0):
    """Digits of 28 x 28 in colours, [count, 3, 32, 32] uint8 and their labels."""
    digits = data.load("mnist")
    chosen = torch.arange(start, start + 499 * count, 499) % len(digits)
    grey = torch.nn.functional.pad(digits.stored[chosen], (2, 2, 2, 2))
    return torch.cat([grey, 255 - grey, grey // 2], 1).numpy(), digits.labels[chosen].numpy()


def binary(path, pixels, labels):
    records = np.concatenate([labels.astype(np.uint8)[:, None], pixels.reshape(len(pixels), -1)], 1)
    path.write_bytes(records.tobytes())


def python2(path, batch):
    """As Python 2 wrote the real files, opcode by opcode: protocol 2, strings of bytes, numpy's modules' old names."""
    raw, labels = batch["data"].tobytes(), batch["labels"]

    def text(value):
        return b"U" + bytes([len(value)]) + value

    path.write_bytes(
        b"\x80\x02}q\x01(" + text(b"batch_label") + text(b"one") + text(b"labels")
        + b"]q\x02(" + b"".join(b"K" + bytes([k]) for k in labels) + b"e"
        + text(b"data") + b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85" + text(b"b")
        + b"\x87R(K\x01K" + bytes([len(labels)]) + b"M\x00\x0c\x86cnumpy\ndtype\nq\x05" + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"T" + struct.pack("<I", len(raw)) + raw + b"tbu."
    )  # fmt: skip


def python3(protocol):
    return lambda path, batch: path.write_bytes(pickle.dumps(batch, protocol=protocol))


def bytes_keys(path, batch):
    path.write_bytes(pickle.dumps({key.encode(): value for key, value in batch.items()}))


WRITERS = {"python2": python2, "bytes keys": bytes_keys, **{f"protocol {p}": python3(p) for p in (0, 2, 3, 4, 5)}}


def batch_of(pixels, labels):
    return {"batch_label": "one", "labels": labels.tolist(), "data": pixels.reshape(len(pixels), -1)}


def test_the_binary_version(tmp_path):
    parts = [small(6, start) for start in (0, 50)]
    for k, part in enumerate(parts, 1):
        binary(tmp_path / f"data_batch_{k}.bin", *part)
    binary(tmp_path / "test_batch.bin", *small(3, 100))
    for name, expected in (("", parts), ("test_batch.bin", [small(3, 100)]), ("data_batch_2.bin", parts[1:])):
        images = data.load(tmp_path / name)
        assert np.array_equal(images.pixels.numpy(), np.concatenate([x for x, _ in expected]))
        assert images.labels.tolist() == np.concatenate([y for _, y in expected]).tolist()
        assert images.shape == (3, 32, 32) and images.classes == cifar.CLASSES
    names = [f"class {k}".replace(" ", "-") for k in range(10)]
    (tmp_path / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    assert data.load(tmp_path).classes == tuple(names)
    for file in tmp_path.glob("data_batch_*"):
        file.unlink()
    assert len(data.load(tmp_path)) == 3


@pytest.mark.parametrize("writer", WRITERS)
def test_the_python_version(tmp_path, writer):
    parts = [small(5, start) for start in (0, 50)]
    for k, part in enumerate(parts, 1):
        WRITERS[writer](tmp_path / f"data_batch_{k}", batch_of(*part))
    images = data.load(tmp_path)
    assert np.array_equal(images.pixels.numpy(), np.concatenate([x for x, _ in parts]))
    assert images.labels.tolist() == [*parts[0][1], *parts[1][1]] and images.classes == cifar.CLASSES
    names = [b"a" if writer == "bytes keys" else "a", *"bcdefghij"]
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": names, "num_vis": 3072}))
    assert data.load(tmp_path / "data_batch_1").classes == tuple("abcdefghij")


class Bomb:
    def __init__(self, call, *arguments):
        self.made = (call, arguments)

    def __reduce__(self):
        return self.made


def bombs(tmp_path):
    mark = str(tmp_path / "executed")
    return {
        "os.system": Bomb(os.system, f"touch {mark}"),
        "open": Bomb(open, mark, "w"),
        "eval": Bomb(eval, f"open({mark!r}, 'w')"),
        "numpy": Bomb(np.save, mark, np.zeros(1)),
        "in an array": np.array([Bomb(open, mark, "w")], dtype=object),
        "in a list": [1, {"data": Bomb(os.mkdir, mark)}],
    }


@pytest.mark.parametrize("bomb", ["os.system", "open", "eval", "numpy", "in an array", "in a list"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_pickles_are_not_executed(tmp_path, bomb, protocol, name):
    pixels, labels = small(2)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch_of(pixels, labels)))
    content = bombs(tmp_path)[bomb]
    (tmp_path / name).write_bytes(pickle.dumps({"data": content, "labels": [], "label_names": []}, protocol))
    with pytest.raises(DataError, match=rf"{name}: .*a pickle that asks for .*; nothing in it was executed; remedy"):
        data.load(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"data_batch_1", name}


PIXELS, LABELS = np.zeros((4, 3072), np.uint8), [0, 1, 2, 3]
WRONG = {
    "no dict": ([1, 2], "expected a CIFAR-10 batch with data, got list"),
    "no labels": ({"data": PIXELS}, "expected a CIFAR-10 batch with labels, got data"),
    "floats": ({"data": PIXELS.astype(np.float32), "labels": LABELS}, "expected an array of bytes"),
    "columns": ({"data": np.asfortranarray(PIXELS), "labels": LABELS}, "expected an array of bytes"),
    "width": ({"data": PIXELS[:, :-1].copy(), "labels": LABELS}, "3072 an image, got 12284 bytes"),
    "no array": ({"data": b"abc", "labels": LABELS}, "expected an array of bytes"),
    "few labels": ({"data": PIXELS, "labels": LABELS[:3]}, "expected 4 labels, integers"),
    "texts": ({"data": PIXELS, "labels": ["a"] * 4}, "expected 4 labels, integers"),
    "range": ({"data": PIXELS, "labels": [0, 1, 2, 10]}, "expected labels from 0 to 9, got 0 to 10"),
    "negative": ({"data": PIXELS, "labels": [0, 1, 2, -1]}, "expected labels from 0 to 9, got -1 to 2"),
    "empty": ({"data": PIXELS[:0], "labels": []}, "expected at least one image"),
}


@pytest.mark.parametrize("case", WRONG)
def test_batches_that_do_not_serve(tmp_path, case):
    content, message = WRONG[case]
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message):
        data.load(tmp_path / "test_batch")


def test_broken_files(tmp_path):
    whole = pickle.dumps({"data": PIXELS, "labels": LABELS})
    (tmp_path / "data_batch_1").write_bytes(whole[:5000])
    with pytest.raises(DataError, match="data_batch_1: expected a CIFAR-10 batch of arrays, lists and numbers, got"):
        data.load(tmp_path)
    binary(tmp_path / "data_batch_1.bin", *small(2))
    with pytest.raises(DataError, match="expected one version of CIFAR-10, got both"):
        data.load(tmp_path)
    file = tmp_path / "data_batch_1.bin"
    raw = file.read_bytes()
    for content, message in (
        (raw[:-1], "3073 bytes an image, got 6145 bytes"),
        (b"", "expected at least one image"),
        (b"\x0a" + raw[1:], "expected labels from 0 to 9, got .* to 10"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            data.load(file)


def test_numpys_own_unpickling_is_not_used(tmp_path):
    """NumPy trusts the shape and type that a pickle gives: 2**40 elements would be asked of the memory."""
    state = pickle.dumps({"data": PIXELS[:1], "labels": [0]}, protocol=2)
    shape = pickle.dumps((1, 3072), protocol=2)[2:-1]
    assert shape[:5] in state
    (tmp_path / "data_batch_1").write_bytes(state.replace(b"K\x01M\x00\x0c", b"K\x01J\xff\xff\xff\x7f"))
    assert len(data.load(tmp_path)) == 1  # the bytes that are there count
