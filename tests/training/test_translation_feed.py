"""Batches of two sets of images: orders, pairs, augmentation."""

import torch
from torch import nn

from genai_fast.config import TranslationConfig
from genai_fast.data import Images
from genai_fast.training.batches import TranslationFeed


def numbered(first, count):
    """Images whose pixels are their numbers."""
    return torch.arange(first, first + count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()


def sets(a, b):
    """Two sets whose images are their numbers, over 100."""
    return [Images(n, numbered(0, count) / 100, None) for n, count in (("A", a), ("B", b))]


def feed(a, b, pairs=False, **settings):
    model = nn.Module()  # in [0, 1]
    config = TranslationConfig(data="a", data_b="b", batch_size=4, **settings)
    return TranslationFeed(model, *sets(a, b), config, pairs=pairs)


def numbers(batches):
    return [[(x[:, 0, 0, 0] * 100).round().int().tolist() for x in batch] for batch in batches]


def test_the_smaller_set_begins_again_until_the_larger_is_through():
    fed = feed(5, 18)
    assert (fed.steps, fed.samples, fed.size) == (4, 16, 4)
    first, second = numbers(fed.epoch(0)), numbers(fed.epoch(1))
    for epoch in (first, second):
        a, b = ([k for batch in epoch for k in batch[number]] for number in range(2))
        assert len(set(b)) == 16 and all(set(a[k : k + 5]) == set(range(5)) for k in (0, 5, 10))
        assert a[:5] != a[5:10] or a[5:10] != a[10:15]
    assert first != second and numbers(fed.epoch(0)) == first
    assert numbers(fed.epoch(0, 2)) == first[2:]  # as a resumed run begins
    every = numbers(fed.all())
    assert [k for _, b in every for k in b] == list(range(18)) and every[1][0] == [4, 0, 1, 2]


def test_sets_of_one_size_have_orders_of_their_own_and_pairs_have_one():
    a, b = ([k for batch in numbers(feed(16, 16).epoch(0)) for k in batch[number]] for number in range(2))
    assert sorted(a) == sorted(b) == list(range(16)) and a != b
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 8
    paired = numbers(feed(16, 16, pairs=True).epoch(3))
    assert all(a == b for a, b in paired)


def test_pairs_are_augmented_alike_and_others_are_not():
    images = Images("x", torch.rand(8, 1, 6, 6))
    config = TranslationConfig(data="a", data_b="b", batch_size=8, flip=0.5, crop=2, rotate=20.0)
    for pairs in (True, False):
        ((a, b),) = TranslationFeed(nn.Module(), images, images, config, pairs=pairs).epoch(0)
        assert torch.equal(a, b) is pairs
        if pairs:
            fed = TranslationFeed(nn.Module(), images, images, config, pairs=True)
            fed.rows = lambda total: torch.arange(total)[2:5]  # one process of several
            assert all(torch.equal(x, y[2:5]) for x, y in zip(next(fed.epoch(0)), (a, b), strict=True))
