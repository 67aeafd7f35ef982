"""What goes into a step: batches, augmentation, and the thread that makes them."""

import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from genai_fast import data
from genai_fast.data import Augment, DataError, Images, ahead, batches
from genai_fast.errors import UsageError


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def photos():
    """Random colours of 12 x 10, floats, with labels."""
    generator = torch.Generator().manual_seed(0)
    return Images("photos", torch.rand(23, 3, 12, 10, generator=generator), torch.arange(23) % 4, tuple("abcd"))


def test_signed_is_the_same_from_minus_one():
    every = Images("bytes", torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1))
    plain, signed = (every.batch(slice(None), signed=s) for s in (False, True))
    assert plain.dtype == signed.dtype == torch.float32
    assert plain[0] == 0 and plain[-1] == 1 and signed[0] == -1 and signed[-1] == 1
    assert torch.equal(plain.flatten(), torch.arange(256) / 255)
    torch.testing.assert_close(signed, plain.double().mul(2).sub(1).float(), rtol=0, atol=1e-7)


def test_a_batch_is_never_the_stored_pixels_changed(photos):
    before = photos.stored.clone()
    photos.batch(slice(0, 3), signed=True)
    list(batches(photos, 5, 0, 0, signed=True, augment=Augment(flip=1.0, jitter=1.0)))
    assert torch.equal(photos.stored, before)


@pytest.mark.parametrize(
    "index", [slice(2, 5), torch.tensor([3, 1]), torch.arange(23) % 2 == 0], ids=["slice", "numbers", "mask"]
)
def test_subsets_of_subsets(photos, index):
    part = photos.subset(torch.arange(22, -1, -1))
    assert torch.equal(part.batch(index), photos.stored.flip(0)[index]) and part.batch(index).is_contiguous()
    again = part.subset(torch.tensor([0, 22]))
    assert len(again) == 2 and again.labels.tolist() == [22 % 4, 0] and again.shape == photos.shape
    assert torch.equal(again.pixels, photos.stored[[22, 0]])


def test_names_go_with_their_images_and_grey_becomes_colour(photos):
    grey = Images("grey", torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1), names=("a", "b", "c", "d", "e"))
    part = grey.subset(torch.tensor([3, 1]))
    assert (
        part.names == ("d", "b") and part.resized(1).names == ("d", "b") and photos.subset(torch.arange(3)).names == ()
    )
    colour = part.in_colour()
    assert colour.shape == (3, 1, 1) and colour.pixels[:, :, 0, 0].tolist() == [[3] * 3, [1] * 3]
    assert colour.names == part.names and colour.batch(slice(0, 2)).is_contiguous() and photos.in_colour() is photos


def test_labels_go_with_their_images(digits):
    train, _ = digits.split(0.1, seed=1)
    marked = Images("marked", digits.labels.float().div(10).view(-1, 1, 1, 1), digits.labels).subset(train.index)
    seen = 0
    for x, y in batches(marked, 100, seed=2, epoch=0, labels=True):
        torch.testing.assert_close(x.flatten() * 10, y.float())
        seen += len(y)
    assert seen == len(train)


@pytest.mark.parametrize(("whole", "sizes"), [(False, [10, 10, 3]), (True, [10, 10])])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_whole_batches(photos, whole, sizes, start):
    got = [x for (x,) in batches(photos, 10, 0, 0, start, whole=whole)]
    assert [len(x) for x in got] == sizes[start:]
    for x, (other,) in zip(got, batches(photos, 10, 0, 0, start), strict=False):
        assert torch.equal(x, other)


def test_what_cannot_be_is_said_at_the_call(photos):
    message = "photos: fewer images than a batch: expected at least 24 images, got 23; remedy: a smaller --batch-size"
    with pytest.raises(DataError, match=message):
        batches(photos, 24, 0, 0, whole=True)
    assert len(list(batches(photos, 23, 0, 0, whole=True))) == 1
    with pytest.raises(DataError, match="expected images with labels, got none; remedy: one subfolder for each class"):
        batches(Images("bare", photos.stored), 4, 0, 0, labels=True)


ALL = Augment(flip=0.5, crop=3, rotate=20.0, jitter=0.5, zoom=0.2)


def test_nothing_to_do_is_done_bit_for_bit(digits):
    plain = list(batches(digits, 64, 0, 1))
    assert all(
        torch.equal(a, b) for (a,), (b,) in zip(plain, batches(digits, 64, 0, 1, augment=Augment()), strict=True)
    )
    x = digits.batch(slice(0, 5))
    assert Augment()(x, 0, 0, 0) is x and not Augment() and ALL


@pytest.mark.parametrize("signed", [False, True])
def test_randomness_is_of_seed_epoch_and_batch(photos, signed):
    def of(seed, epoch, start=0):
        return [x for (x,) in batches(photos, 8, seed, epoch, start, augment=ALL, signed=signed)]

    straight = of(3, 1)
    torch.manual_seed(1)  # torch's own generator has no say, and is not drawn from
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(straight[1:], of(3, 1, 1), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    x = photos.batch(slice(0, 8))
    different = [ALL(x, seed, epoch, batch) for seed in (0, 1) for epoch in (0, 1) for batch in (0, 1)]
    assert all(not torch.equal(a, b) for k, a in enumerate(different) for b in different[:k])
    low = -1 if signed else 0
    assert all(low <= x.min() and x.max() <= 1 and x.is_contiguous() and x.dtype == torch.float32 for x in straight)


def test_flip_mirrors_a_share_of_the_images(photos):
    x = photos.batch(torch.zeros(4000, dtype=torch.int64))
    flipped = Augment(flip=0.25)(x, 0, 0, 0)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert (mirrored | (flipped == x).flatten(1).all(1)).all()
    assert abs(mirrored.double().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    assert torch.equal(Augment(flip=1.0)(x[:9], 5, 0, 0), x[:9].flip(3))


def test_crop_is_a_window_of_the_reflected_image(photos):
    x = photos.batch(torch.zeros(2000, dtype=torch.int64))
    got = Augment(crop=2)(x, 0, 0, 0)
    padded = torch.nn.functional.pad(x[:1], (2, 2, 2, 2), mode="reflect")
    counts = torch.stack(
        [(got == padded[..., i : i + 12, j : j + 10]).flatten(1).all(1).sum() for i in range(5) for j in range(5)]
    )
    assert counts.sum() == 2000 and counts.min() > 40  # each of 25 places, 80 on average
    with pytest.raises(UsageError, match=r"crop: expected less than the images' side \(10 x 12\), got 10"):
        Augment(crop=10)(x, 0, 0, 0)
    Augment(crop=9)(x[:5], 0, 0, 0)


@pytest.mark.parametrize("shape", [(31, 31), (31, 41)])
def test_rotation_turns_by_the_angle(shape):
    """A bright spot goes where a turn by an angle within the limit takes it, whatever the sides' ratio."""
    height, width = shape
    x = torch.zeros(200, 1, height, width)
    reach = 7.0
    x[:, 0, height // 2, width // 2 + int(reach)] = 1.0
    got = Augment(rotate=45.0)(x, 0, 0, 0)[:, 0].double()
    mass = got.sum((1, 2))
    down = (got.sum(2) * torch.arange(height)).sum(1) / mass - height // 2
    right = (got.sum(1) * torch.arange(width)).sum(1) / mass - width // 2
    torch.testing.assert_close(torch.hypot(down, right), torch.full_like(down, reach), atol=0.3, rtol=0)
    angle = torch.rad2deg(torch.atan2(down, right))
    assert angle.abs().max() < 47 and angle.min() < -35 and angle.max() > 35 and abs(angle.mean()) < 8


@pytest.mark.parametrize("rotate", [0.0, 10.0])
def test_zoom_moves_spots_from_and_to_the_centre(rotate):
    """By factors whose logarithms are within the limit, on both sides, whatever the angle."""
    x = torch.zeros(300, 1, 41, 41)
    x[:, 0, 20, 28] = 1.0  # far enough from the borders that no reflection is seen
    got = Augment(rotate=rotate, zoom=0.3)(x, 0, 0, 0)[:, 0].double()
    mass, places = got.sum((1, 2)), torch.arange(41) - 20
    down, right = ((got.sum(axis) * places).sum(1) / mass for axis in (2, 1))
    factors = torch.hypot(down, right) / 8
    assert 0.64 < factors.min() < 0.75 and 1.33 < factors.max() < 1.48
    assert abs(factors.log().mean()) < 0.05 and got.min() >= 0 and got.max() <= 1


def test_jitter_changes_light_and_keeps_grey_grey(photos):
    x = photos.batch(slice(None))
    got = Augment(jitter=0.3)(x, 0, 0, 0)
    assert 0.01 < (got - x).abs().mean() < 0.3
    grey = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    turned = Augment(jitter=0.3)(grey.contiguous(), 0, 0, 0)
    torch.testing.assert_close(turned, turned[:, :1].expand(-1, 3, -1, -1), atol=1e-6, rtol=0)
    flat = torch.full((500, 1, 2, 2), 0.5)
    levels = Augment(jitter=0.3)(flat, 0, 0, 0)[:, 0, 0, 0]  # contrast leaves it: brightness alone
    assert 0.35 <= levels.min() < 0.36 and 0.64 < levels.max() <= 0.65 + 1e-6


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"flip": 1.5}, "flip: expected a number from 0 to 1, got 1.5"),
        ({"crop": -1}, "crop: expected a whole number from 0 to inf, got -1"),
        ({"crop": 1.5}, "crop: expected a whole number"),
        ({"rotate": math.nan}, "rotate: expected a number from 0 to 180, got nan"),
        ({"zoom": 1}, "zoom: expected a number from 0 to 0.9, got 1"),
        ({"jitter": 2}, "jitter: expected a number from 0 to 1, got 2"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(UsageError, match=message):
        Augment(**setting)


def threads():
    return [t for t in threading.enumerate() if t.name == "genai_fast.data.ahead"]


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_ahead_gives_the_same(digits, depth):
    made = [x for (x,) in ahead(batches(digits, 100, 0, 0), depth)]
    plain = [x for (x,) in batches(digits, 100, 0, 0)]
    assert len(made) == 18 and all(torch.equal(a, b) for a, b in zip(made, plain, strict=True))
    assert list(ahead([])) == [] and list(ahead([None, 1])) == [None, 1] and not threads()


def test_ahead_is_ahead_but_not_further():
    made, more = [], threading.Semaphore(0)

    def items():
        for k in range(10):
            made.append(k)
            more.release()
            yield k

    feed = ahead(items(), depth=2)
    assert made == [] and not threads()  # not before it is asked
    assert next(feed) == 0
    for _ in range(4):
        assert more.acquire(timeout=10)  # one taken, two ready, one waiting to be put
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    feed.close()
    assert not threads() and made == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [ZeroDivisionError("no"), KeyboardInterrupt()])
def test_errors_come_to_the_consumer_in_their_place(error):
    def items():
        yield 1
        yield 2
        raise error

    feed = ahead(items(), depth=5)
    assert (next(feed), next(feed)) == (1, 2)
    with pytest.raises(type(error)):
        next(feed)
    assert not threads() and list(feed) == []
    with pytest.raises(ValueError, match="depth: expected at least 1, got 0"):
        ahead([], depth=0)


@pytest.fixture
def _quick_collections():
    """Without the many objects that are there already."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("how", ["closed", "dropped", "raised"])
@pytest.mark.usefixtures("_quick_collections")
def test_an_abandoned_thread_ends(depth, how):
    closed = []

    def items():
        try:
            while True:
                yield torch.zeros(3)
        finally:
            closed.append(True)

    def consume(feed):
        for _ in feed:
            raise ZeroDivisionError

    for _ in range(20):  # there is a race to lose
        feed = ahead(items(), depth)
        next(feed)
        if how == "closed":
            feed.close()
        elif how == "raised":
            with pytest.raises(ZeroDivisionError):
                consume(feed)
            feed.close()
        del feed
        gc.collect()
        assert not threads()
    assert len(closed) == 20


def test_neither_exit_nor_interrupt_waits_for_it():
    slow = "import time, genai_fast.data as d\ndef items():\n  while True:\n    yield 1\n    time.sleep(DELAY)\n"
    slow += "feed = d.ahead(items())\nnext(feed)\nprint('ready', flush=True)\n"
    kept = slow.replace("DELAY", "0.01")
    done = subprocess.run([sys.executable, "-c", kept], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ready\n"), done.stderr
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also where it is ignored
    command = [sys.executable, "-c", f"{heard}{slow.replace('DELAY', '1000')}next(feed)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches(digits):
    for x, y in ahead(batches(digits, 100, 0, 0, labels=True), pin=True):
        assert x.is_pinned() and y.is_pinned()


def test_labels_in_files_are_checked(tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint8)
    for label, message in ((-1, "integers from 0 on"), (2**40, "expected labels below 65536, got 1099511627776")):
        np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([0, label]))
        with pytest.raises(DataError, match=message):
            data.load(tmp_path / "a.npz")
