"""Packed text and its feeds: every token once, resumed in mid-epoch, the same from run to run."""

import itertools
import json
import os
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genai_fast.data import DataError, DataWarning, cache, text
from genai_fast.data.text import packed, tokenizers

BYTE = text.make_tokenizer("byte", [])
DOCUMENTS = [f"Document {k}: " + "naïve text " * (k % 7) for k in range(40)]


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Where ids are kept."""
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def encoded(monkeypatch):
    """The texts that were encoded."""
    done, real = [], tokenizers.ByteTokenizer.arrays
    monkeypatch.setattr(tokenizers.ByteTokenizer, "arrays", lambda self, texts: done.extend(texts) or real(self, texts))
    return done


def running(count):
    """Ids 0, 1, 2, ... in the place of a text, in one document."""
    return text.Tokens(np.arange(count, dtype=np.uint16), np.array([0, count]), 60000)


def rows(*lengths):
    """Documents of such lengths, the end included; no two ids are equal but the ends."""
    offsets = np.cumsum([0, *lengths])
    ids = np.arange(offsets[-1], dtype=np.uint16)
    ids[offsets[1:] - 1] = 60000
    return text.Tokens(ids, offsets, 60000)


@pytest.mark.parametrize("kind", tokenizers.KINDS)
@pytest.mark.parametrize("where", [False, None])
def test_documents_end_with_the_end(kept, kind, where):
    tokenizer = text.make_tokenizer(kind, DOCUMENTS, 400 if kind == "bpe" else None)
    tokens = text.pack([*DOCUMENTS, ""], tokenizer, where)
    assert (tokens.documents, tokens.ids.dtype, tokens.unknown) == (41, np.uint16, 0)
    assert len(tokens) == tokens.offsets[-1] == (tokens.ids != tokens.end).sum() + 41
    for document, first, last in zip(DOCUMENTS, tokens.offsets, tokens.offsets[1:], strict=False):
        assert tokens.ids[last - 1] == tokenizer.end
        assert tokens.ids[first : last - 1].tolist() == tokenizer.encode(document)
    assert isinstance(tokens.ids, np.memmap) == (where is None) == kept.exists()


def test_ids_are_kept(kept, encoded):
    first = text.pack(DOCUMENTS, BYTE)
    again = text.pack(list(DOCUMENTS), BYTE)
    assert len(encoded) == len(DOCUMENTS) and np.array_equal(first.ids, again.ids) and len(list(kept.iterdir())) == 1
    text.pack([DOCUMENTS[0] + DOCUMENTS[1], *DOCUMENTS[2:]], BYTE)  # the same characters, other documents
    text.pack(DOCUMENTS, text.make_tokenizer("char", DOCUMENTS))
    assert len(list(kept.iterdir())) == 3
    elsewhere = text.pack(DOCUMENTS, BYTE, kept.parent / "other")
    assert len(list((kept.parent / "other").iterdir())) == 1 and np.array_equal(elsewhere.ids, first.ids)


def edit(entry):
    meta = json.loads((entry / "meta.json").read_text())
    (entry / "meta.json").write_text(json.dumps({**meta, "version": cache.VERSION + 1}))


DAMAGE = {
    "truncated": lambda entry: os.truncate(entry / "ids.npy", 200),
    "another version": edit,
    "no meta": lambda entry: (entry / "meta.json").unlink(),
    "no offsets": lambda entry: (entry / "offsets.npy").unlink(),
    "other offsets": lambda entry: np.save(entry / "offsets.npy", np.zeros(41, np.float64)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entries_are_made_anew(kept, encoded, damage):
    expected = text.pack(DOCUMENTS, BYTE, False)
    text.pack(DOCUMENTS, BYTE)
    (entry,) = kept.iterdir()
    DAMAGE[damage](entry)
    for _ in range(2):
        tokens = text.pack(DOCUMENTS, BYTE)
        assert np.array_equal(tokens.ids, expected.ids) and np.array_equal(tokens.offsets, expected.offsets)
    assert len(encoded) == 3 * len(DOCUMENTS) and list(kept.iterdir()) == [entry]


def test_what_nobody_reads_goes_after_a_month(kept):
    for k in range(3):
        text.pack([f"text {k}"], BYTE)
    (kept / "mine").mkdir()
    for path in kept.iterdir():
        os.utime(path, (0, 0))
    text.pack(["text 1"], BYTE)  # read
    text.pack(["text 3"], BYTE)  # written
    assert len(list(kept.iterdir())) == 3 and (kept / "mine").exists()


def test_a_cache_that_cannot_be_written_is_done_without(kept):
    kept.parent.mkdir()
    kept.write_text("a file where a folder should be")
    with pytest.warns(DataWarning, match="cannot be written: .*; text is encoded to memory"):
        tokens = text.pack(DOCUMENTS, BYTE)
    assert np.array_equal(tokens.ids, text.pack(DOCUMENTS, BYTE, False).ids)


def test_many_ids_are_wide(monkeypatch):
    monkeypatch.setattr(tokenizers.ByteTokenizer, "size", (1 << 16) + 1)
    assert text.pack(["a"], BYTE, False).ids.dtype == np.uint32
    monkeypatch.setattr(tokenizers.ByteTokenizer, "size", 1 << 16)
    assert text.pack(["a"], BYTE, False).ids.dtype == np.uint16


def test_unknown_characters_are_counted(kept):
    tokenizer = text.make_tokenizer("char", ["abc"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text.pack(["abc" * 100, "d"], tokenizer).unknown == 1
    for _ in range(2):  # the second time from the cache
        with pytest.warns(DataWarning, match=r"pack: 2 of 5 characters are not in the tokenizer .*; remedy"):
            assert text.pack(["abcd", "e"], tokenizer).unknown == 2


@pytest.mark.parametrize(("documents", "got"), [([], "none"), ("text", "one str")])
def test_what_cannot_be_packed_is_refused(documents, got):
    with pytest.raises(DataError, match=f"pack: expected a list of at least one document, got {got}"):
        text.pack(documents, BYTE)


def same(a, b):
    return len(a) == len(b) and all(all(map(torch.equal, p, q)) for p, q in zip(a, b, strict=True))


FEEDS = {
    "windows": lambda seed: text.Windows(running(500), 7, 4, seed),
    "streams": lambda seed: text.Streams(running(500), 7, 4),
    "sequences": lambda seed: text.Sequences(rows(*(1 + k % 23 for k in range(90))), 40, 4, seed),
    "pairs": lambda seed: text.Pairs(
        rows(*(1 + k % 23 for k in range(90))), rows(*(1 + k % 19 for k in range(90))), 40, 4, seed
    ),
}


@pytest.mark.parametrize("name", FEEDS)
def test_an_epoch_goes_on_in_its_middle(name):
    feed = FEEDS[name](3)
    whole = list(feed.epoch(2))
    assert len(whole) == feed.steps and feed.samples == 4 * feed.steps == sum(len(batch[0]) for batch in whole)
    for start in (0, 1, feed.steps - 1, feed.steps):
        assert same(list(FEEDS[name](3).epoch(2, start)), whole[start:])
    others = [list(FEEDS[name](3).epoch(1)), list(FEEDS[name](4).epoch(2))]
    assert all(same(other, whole) == (name == "streams") for other in others)
    for batch in whole:
        floats = [x.dtype for x in batch if x.dtype != torch.int64]
        assert floats == [torch.float32] * (name == "streams") and all(x.is_contiguous() for x in batch)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(1, 20), st.integers(1, 6), st.integers(0, 9))
def test_windows(count, block, size, epoch):
    feed = text.Windows(running(count), block, size, seed=1)
    targets = torch.cat([y.flatten() for _, y in feed.all()])
    assert targets.tolist() == list(range(1, count))  # each token once, in order
    if (size + 1) * block > count:
        with pytest.raises(DataError, match=rf"Windows: expected at least {(size + 1) * block} tokens for a batch"):
            feed.epoch(epoch)
        return
    batches = list(feed.epoch(epoch))
    assert len(batches) == feed.steps >= 1
    assert all(x.shape == y.shape == (size, block) and torch.equal(y, x + 1) for x, y in batches)
    starts = torch.cat([x[:, 0] for x, _ in batches])
    assert len(starts.unique()) == feed.samples and len((starts % block).unique()) == 1
    assert starts.min() >= 0 and starts.max() + block < count


def test_windows_begin_anywhere():
    feed = text.Windows(running(100), 5, 2, seed=0)
    assert {int(next(feed.epoch(e))[0][0, 0]) % 5 for e in range(60)} == set(range(5))
    assert len(list(feed.epoch(0))) == len(list(feed.epoch(1))) == feed.steps


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(1, 20), st.integers(1, 6))
def test_streams(count, block, size):
    feed = text.Streams(running(count), block, size)
    batches = list(feed.all())
    targets = torch.cat([y.flatten() for _, y, _ in batches])
    assert sorted(targets[targets >= 0].tolist()) == list(range(1, count))  # each token once
    counted = [(x[y >= 0], y[y >= 0]) for x, y, _ in batches]
    assert all(torch.equal(y, x + 1) and len(y) for x, y in counted)
    assert all((x[y < 0] == 60000).all() and (y[y < 0] == -100).all() for x, y, _ in batches)
    everything = [batches]
    if count <= size * block:
        with pytest.raises(DataError, match=rf"Streams: expected at least {size * block + 1} tokens .* got {count}"):
            feed.epoch(0)
    else:
        everything.append(list(feed.epoch(0)))
        assert len(everything[1]) == feed.steps
        assert all(x.shape == y.shape == (size, block) and carry.shape == (size,) for x, y, carry in everything[1])
        assert count - 1 - feed.steps * block * size < size * block  # what no batch has
    for batches in everything:
        assert [carry.unique().tolist() for *_, carry in batches] == [[0.0], *[[1.0]] * (len(batches) - 1)]
        for (_, y, _), (x, _, _) in itertools.pairwise(batches):
            assert torch.equal(x[:, 0][x[:, 0] < 60000], y[:, -1][x[:, 0] < 60000])  # streams go on


def unpadded(ids, lengths):
    """The sequences of a batch, whose padding is the end."""
    assert (ids.gather(1, lengths[:, None] - 1) == 60000).all()
    beyond = torch.arange(ids.shape[1]) >= lengths[:, None]
    assert (ids[beyond] == 60000).all()
    return [tuple(row[:length].tolist()) for row, length in zip(ids, lengths, strict=True)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 60), st.integers(1, 8), st.integers(0, 3))
def test_sequences(lengths, longest, size, epoch):
    tokens = rows(*lengths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        feed = text.Sequences(tokens, longest, size, seed=5)
    assert feed.cut == sum(length > longest for length in lengths)
    whole = [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)]
    expected = [tuple(row) if len(row) <= longest else (*row[: longest - 1], 60000) for row in whole]
    assert [row for batch in feed.all() for row in unpadded(*batch)] == expected
    if len(lengths) < size:
        with pytest.raises(DataError, match=f"Sequences: expected at least {size} texts .* got {len(lengths)}; remedy"):
            feed.epoch(epoch)
        return
    batches = list(feed.epoch(epoch))
    found = [row for batch in batches for row in unpadded(*batch)]
    assert len(found) == feed.samples == len(lengths) // size * size
    left = list(expected)
    for row in found:
        left.remove(row)  # none twice
    for ids, these in batches:
        assert ids.shape == (size, min(longest, -(-int(these.max()) // 16) * 16))


def test_like_lengths_come_together():
    lengths = np.random.default_rng(0).integers(1, 200, 640)
    feed = text.Sequences(rows(*lengths), 200, 8, seed=0)
    batches = list(feed.epoch(0))
    padding = sum(ids.numel() - int(n.sum()) for ids, n in batches) / sum(ids.numel() for ids, _ in batches)
    assert padding < 0.15  # in random order it is near a half
    firsts = [int(n.max()) for _, n in batches]
    assert firsts != sorted(firsts)  # but batches are in random order


def test_pairs_stay_together():
    sources, targets = rows(*(2 + k % 30 for k in range(50))), rows(*(2 + k % 11 for k in range(50)))
    feed = text.Pairs(sources, targets, 40, 4, seed=0)
    starts = zip(sources.offsets[:-1], targets.offsets[:-1], strict=True)
    of = {int(sources.ids[a]): int(targets.ids[b]) for a, b in starts}
    for batches in (feed.all(), feed.epoch(0)):
        found = [pair for s, n, t, m in batches for pair in zip(unpadded(s, n), unpadded(t, m), strict=True)]
        assert len(set(found)) >= 48 and all(of[s[0]] == t[0] for s, t in found)
    with pytest.raises(DataError, match="Pairs: expected as many targets as sources, 50, got 3; remedy"):
        text.Pairs(sources, rows(1, 2, 3), 40, 4)


def test_what_is_cut_is_said_once():
    with pytest.warns(DataWarning, match="Sequences: 2 of 3 texts have more than 5 tokens and are cut; remedy") as said:
        feed = text.Sequences(rows(3, 6, 9), 5, 1)
        list(feed.epoch(0))
    assert len(said) == 1


@pytest.mark.parametrize("make", [text.Windows, text.Streams, text.Sequences])
def test_odd_sizes_are_refused(make):
    for wrong in ((0, 4), (4, 0)):
        with pytest.raises(DataError, match=rf"{make.__name__}: \w+: expected at least 1, got 0"):
            make(running(100), *wrong)
    if make is not text.Sequences:
        with pytest.raises(DataError, match="expected at least 2 tokens, got 1; remedy: more text"):
            make(running(1), 4, 4)


def test_from_files_to_batches(kept):
    train, held_out = text.load("pydoc").split(0.1, seed=0)
    tokenizer = text.make_tokenizer("bpe", train.documents, 1000)
    feed = text.Windows(text.pack(train.documents, tokenizer), 64, 8, seed=0)
    x, y = next(feed.epoch(0))
    assert tokenizer.decode(x[0].tolist()) in tokenizer.decode(feed._ids.tolist())
    assert torch.equal(x[:, 1:], y[:, :-1])
    pairs = text.continuations(held_out).pairs
    sources, targets = text.pack_pairs(pairs, tokenizer)
    for s, n, t, m in text.Pairs(sources, targets, 10_000, 8).all():
        for row in range(len(s)):
            pair = tokenizer.decode(s[row, : n[row]].tolist()), tokenizer.decode(t[row, : m[row]].tolist())
            assert pair == pairs.pop(0)
    assert not pairs and len(packed.text_digest(["a"])) == 64
