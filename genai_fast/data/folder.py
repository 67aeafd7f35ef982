"""Folders and zip files of pictures: decoded once, in threads, into a mapped file of the cache."""

import warnings
from pathlib import Path

import numpy as np
import torch

from genai_fast.data import cache as store
from genai_fast.data import picture
from genai_fast.data.class_folders import Kind, Source, check_arranged, in_threads, labels_of, report, source_of
from genai_fast.data.errors import DataError, DataWarning, printable, reason
from genai_fast.data.images import Images
from genai_fast.data.picture import Form

PICTURES = Kind("picture", picture.SUFFIXES)


def load_pictures(path: Path, size: int | None, *, strict: bool, cache: bool | str | Path | None) -> Images:
    """See genai_fast.data.load."""
    if size is not None and size < 1:
        raise DataError(f"size: expected at least 1 pixel, got {size}")
    picture.check_pillow()
    source = source_of(path, PICTURES)
    try:
        check_arranged(path, PICTURES, source.arranged, strict)
        entry = None
        if cache is not False:
            parent = store.folder("images") if cache in (None, True) else Path(cache)
            entry = store.Entry.of(parent, [str(path.resolve()), size], source.state)
        pixels, broken, content = (entry and _kept(entry, source)) or _decode(source, size, entry)
    finally:
        source.close()
    if broken:
        report(source.path, PICTURES, broken, len(source.arranged.names), strict)
    labels, classes = labels_of(source.arranged.names, broken)
    skipped = tuple(map(printable, broken))
    names = tuple(name for name in source.arranged.names if name not in broken)
    return Images(path.name, torch.from_numpy(pixels), labels, classes, skipped, content=content, names=names)


_Decoded = tuple[np.ndarray, dict[str, str], str]  # pixels, what is broken and why, array_digest or ""


def _kept(entry: store.Entry, source: Source) -> _Decoded | None:
    """What an entry holds, if it is of these pictures: its folder may be shared with others."""
    found = entry.read()
    if found is None:
        return None
    pixels, broken = found.arrays.get(store.PIXELS), found.about.get("broken")
    fits = pixels is not None and pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[1] in (1, 3)
    names = source.arranged.names
    if not fits or not isinstance(broken, dict) or not broken.keys() <= set(names):
        return None
    return (pixels, broken, found.digests[store.PIXELS]) if len(pixels) == len(names) - len(broken) else None


def _decode(source: Source, size: int | None, entry: store.Entry | None) -> _Decoded:
    """The pictures, by way of a new entry of the cache if there is one to make."""
    numbers, form, broken = _survey(source, size)
    names = [source.arranged.names[k] for k in numbers]
    shape = (len(names), 1 if form.grey else 3, form.height, form.width)

    def fill(pixels: np.ndarray) -> np.ndarray:
        def one(row: int) -> None:
            with source.open(names[row]) as file:
                pixels[row] = picture.read_pixels(file, form, size)

        failed = {row: why for row, why in enumerate(in_threads(one, range(len(names)))) if why is not None}
        broken.update((names[row], why) for row, why in failed.items())
        if len(broken) == len(source.arranged.names):
            report(source.path, PICTURES, _in_order(source, broken), len(broken), True)
        return np.array([row for row in range(len(names)) if row not in failed])

    if entry is not None:
        try:
            with entry.writer() as hidden:
                pixels = store.new_array(hidden, store.PIXELS, shape)
                rows = fill(pixels)
                pixels.flush()
                if len(rows) < len(names):
                    store.keep_rows(hidden, pixels, rows)
                broken = _in_order(source, broken)
                entry.finish(hidden, {"broken": broken})
            if found := _kept(entry, source):
                return found
        except OSError as error:
            message = f"{entry.path}: cannot be written: {error.strerror or error}; pictures are decoded to memory"
            warnings.warn(message, DataWarning, stacklevel=4)
    pixels = np.empty(shape, np.uint8)
    rows = fill(pixels)
    return (pixels if len(rows) == len(names) else pixels[rows]), _in_order(source, broken), ""


def _in_order(source: Source, broken: dict[str, str]) -> dict[str, str]:
    return {name: broken[name] for name in source.arranged.names if name in broken}


def _survey(source: Source, size: int | None) -> tuple[list[int], Form, dict[str, str]]:
    """(numbers of the files with a good header, what all pictures will be, what is broken and why)."""

    def form_of(k: int) -> Form:
        with source.open(source.arranged.names[k]) as file:
            return picture.read_form(file, size)

    forms = dict(enumerate(in_threads(form_of, range(len(source.arranged.names)))))
    broken = {source.arranged.names[k]: form for k, form in forms.items() if isinstance(form, str)}
    good = {k: form for k, form in forms.items() if not isinstance(form, str)}
    by_size: dict[tuple[int, int], list[int]] = {}
    for k, form in good.items():
        by_size.setdefault(form[:2], []).append(k)
    whole = []
    for numbers in by_size.values() if len(by_size) > 1 else ():
        # A header may lie: only pictures that can be decoded have a size.
        for k in numbers:
            try:
                with source.open(source.arranged.names[k]) as file:
                    picture.read_pixels(file, good[k], size)
            except Exception as error:
                broken[source.arranged.names[k]] = reason(error)
                del good[k]
            else:
                whole.append(k)
                break
    if len(whole) > 1:
        one, other = (source.arranged.names[k] for k in whole[:2])
        expected, got = ("{} x {}".format(*good[k][:2]) for k in whole[:2])
        raise DataError(
            f"{source.path / other}: expected {expected} pixels as {one} has, got {got}; remedy: --size PIXELS"
        )
    if not good:
        report(source.path, PICTURES, _in_order(source, broken), len(broken), True)
    width, height, _ = next(iter(good.values()))
    return list(good), Form(width, height, all(form.grey for form in good.values())), broken
