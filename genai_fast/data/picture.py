"""One picture file: its header, and its pixels in eight bits."""

import contextlib
import functools
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from genai_fast.data.reading import open_regular, parsing
from genai_fast.errors import require

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
# Named, since Pillow goes by content: what calls itself .png may be PostScript, which runs Ghostscript.
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_WIDTH, _HEIGHT = 256, 257  # TIFF's tags
_ORIENTATION = 0x0112  # EXIF's and TIFF's tag; from 5 on, width and height change places
_PROFILE = "Raw profile type exif"  # ImageMagick's text in a PNG
_TEXT = 1 << 20  # bytes of a PNG's text that are looked at
# Pixels decoded at once in all threads, and of one picture if its file is not at least a hundredth of them in bytes:
# photographs compress to a tenth, a file of one colour to a thousandth.
_PIXELS, _RATIO = 1 << 26, 100


class Form(NamedTuple):
    width: int
    height: int
    grey: bool


@functools.cache
def _pillow():
    image, ops = require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    image.init()
    return image, ops, [name for name in FORMATS if name in image.OPEN]


def check_pillow() -> None:
    """Raises UsageError if it is not installed."""
    _pillow()


@contextlib.contextmanager
def opened(file: BinaryIO | str | os.PathLike[str]) -> Iterator[Any]:
    """A picture as Pillow opens it, of the formats above; its `getexif` gives nothing but how it is turned.

    That is found once, without decoding, so what its header says and what becomes of its pixels agree. A tag that
    cannot be read, or names no turn, is as none.

    Raises Exception: it is no such picture, or is far larger than its file; Pillow raises all kinds on broken files.
    """
    image, _, formats = _pillow()
    with image.open(file, formats=formats) as picture:
        pixels = picture.width * picture.height
        packed = _length(picture.fp)
        if pixels > max(_PIXELS, _RATIO * packed):
            raise ValueError(f"{picture.width} x {picture.height} pixels in {packed} bytes; remedy: scale it down")
        tags = image.Exif()
        turn = _turn(picture)
        if turn > 1:
            tags[_ORIENTATION] = turn
        picture.getexif = lambda: tags  # Pillow asks it too when it decodes TIFF
        yield picture


def read_form(file: BinaryIO, size: int | None) -> Form:
    """What the header says the picture will be, upright; of the square `size` if one is given."""
    with opened(file) as picture:
        if size is not None:
            return Form(size, size, _is_grey(picture.mode))
        width, height = picture.size
        if picture.format == "TIFF":  # some versions of Pillow have turned it already
            width, height = picture.tag_v2[_WIDTH], picture.tag_v2[_HEIGHT]
        if picture.getexif().get(_ORIENTATION, 1) >= 5:
            width, height = height, width
        return Form(width, height, _is_grey(picture.mode))


def read_pixels(file: BinaryIO, form: Form, size: int | None) -> np.ndarray:
    """The first picture in the file, upright, [C, H, W] uint8, C 1 or 3 as `form` says.

    With `size`, the centre square is scaled to it. Alpha is dropped over a white background, 16 bits are scaled to 8.

    Raises Exception: as `opened`.
    """
    ops = _pillow()[1]
    with opened(file) as picture:
        if size is not None:
            picture.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size, not below
        with _room.for_pixels(picture.width * picture.height):
            ops.exif_transpose(picture, in_place=True)
            plain = _plain(picture)
            if size is not None:
                plain = ops.fit(plain, (size, size))
    if plain.size != (form.width, form.height):
        raise ValueError("{} x {} pixels where the header says {} x {}".format(*plain.size, *form[:2]))
    if form.grey:
        return np.asarray(plain)[None]
    return np.asarray(plain.convert("RGB")).transpose(2, 0, 1)


def read_picture(path: str | os.PathLike[str], grey: bool) -> np.ndarray:
    """A picture file, upright, [C, H, W] uint8, C 1 if `grey`, else 3.

    Raises DataError: it is no picture that can be read.
    """
    with parsing(path, "a picture", "another picture"), open_regular(path) as file, opened(file) as picture:
        _pillow()[1].exif_transpose(picture, in_place=True)
        plain = _plain(picture).convert("L" if grey else "RGB")
        return np.array(plain)[None] if grey else np.array(plain).transpose(2, 0, 1).copy()


def read_light(path: str | os.PathLike[str], width: int, height: int) -> np.ndarray:
    """The luminance of a picture file, upright, scaled to [height, width], uint8.

    Raises DataError: it is no picture that can be read.
    """
    with parsing(path, "a picture", "another picture"), open_regular(path) as file, opened(file) as picture:
        _pillow()[1].exif_transpose(picture, in_place=True)
        return np.array(picture.convert("L").resize((width, height)))


class _Room:
    """Bounds the pixels that all threads decode at once; a picture of more is decoded by itself."""

    def __init__(self) -> None:
        self._changed, self._taken = threading.Condition(), 0

    @contextlib.contextmanager
    def for_pixels(self, count: int) -> Iterator[None]:
        count = min(count, _PIXELS)
        with self._changed:
            self._changed.wait_for(lambda: self._taken + count <= _PIXELS)
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()


_room = _Room()


def _length(file: BinaryIO) -> int:
    place = file.tell()
    try:
        return file.seek(0, os.SEEK_END)
    finally:
        file.seek(place)


def _turn(picture: Any) -> int:
    """EXIF's orientation, 2 to 8, or 1 if there is none that can be read."""
    image = _pillow()[0]
    with contextlib.suppress(Exception):  # as many as there are ways to damage a tag
        if picture.format == "PNG" and not {"exif", _PROFILE} & picture.info.keys():
            picture.info.update(_tags_after(picture.fp))
        # PNG's own would decode the pixels first.
        found = image.Image.getexif(picture).get(_ORIENTATION)
        if isinstance(found, int) and 2 <= found <= 8:
            return found
    return 1


def _tags_after(file: BinaryIO) -> dict[str, Any]:
    """Tags that follow a PNG's pixels, by the names that Pillow gives those before them."""
    place = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind not in (b"eXIf", b"tEXt", b"zTXt") or length > _TEXT:
                file.seek(length + 4, os.SEEK_CUR)  # four of the check sum
                continue
            body = file.read(length)
            file.seek(4, os.SEEK_CUR)
            name, _, text = body.partition(b"\0")
            if kind == b"eXIf":
                return {"exif": b"Exif\0\0" + body}
            if name.decode("latin-1") == _PROFILE:
                if kind == b"zTXt":
                    text = zlib.decompressobj().decompress(text[1:], _TEXT)
                return {_PROFILE: text.decode("latin-1")}
        return {}
    finally:
        file.seek(place)


def _is_grey(mode: str) -> bool:
    return mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")


def _plain(picture):
    """In mode L or RGB."""
    image, grey = _pillow()[0], _is_grey(picture.mode)
    if picture.mode.startswith("I") or picture.mode == "F":
        return image.fromarray(_eight_bits(np.asarray(picture)))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = image.alpha_composite(image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("L" if grey else "RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """From 16 bits, or floats in [0, 1]: Pillow's own conversion cuts off at 255 instead of scaling."""
    low, high, white = values.min(), values.max(), 1.0 if values.dtype.kind == "f" else 65535
    if not (low >= 0 and high <= white):
        raise ValueError(f"values from {low:g} to {high:g}, where 0 to {white:g} are expected")
    return np.floor(values.astype(np.float64) * (255 / white) + 0.5).astype(np.uint8)
