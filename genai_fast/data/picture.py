"""One picture file: its header, and its pixels in eight bits."""

from __future__ import annotations

import functools
from typing import BinaryIO, NamedTuple

import numpy as np

from genai_fast.errors import require

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
# Named, since Pillow goes by content: what calls itself .png may be PostScript, which runs Ghostscript.
_FORMATS = ("PNG", "JPEG", "MPO", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_WIDTH, _HEIGHT = 256, 257  # TIFF's tags
_ORIENTATION = 0x0112  # EXIF's and TIFF's tag; from 5 on, width and height change places


class Form(NamedTuple):
    width: int
    height: int
    grey: bool


@functools.cache
def _pillow():
    image, ops = require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    image.init()
    return image, ops, [name for name in _FORMATS if name in image.OPEN]


def check_pillow() -> None:
    """Raises UsageError if it is not installed."""
    _pillow()


def read_form(file: BinaryIO, size: int | None) -> Form:
    """What the header says the picture will be, upright; of the square `size` if one is given."""
    image, _, formats = _pillow()
    with image.open(file, formats=formats) as picture:
        if size is not None:
            return Form(size, size, _is_grey(picture.mode))
        width, height = picture.size
        if picture.format == "TIFF":  # some versions of Pillow have turned it already
            width, height = picture.tag_v2[_WIDTH], picture.tag_v2[_HEIGHT]
        # A PNG would be decoded to look for tags behind its pixels; those that count stand before them.
        tagged = picture.format != "PNG" or "exif" in picture.info
        if tagged and picture.getexif().get(_ORIENTATION, 1) >= 5:
            width, height = height, width
        return Form(width, height, _is_grey(picture.mode))


def read_pixels(file: BinaryIO, form: Form, size: int | None) -> np.ndarray:
    """The first picture in the file, upright, [C, H, W] uint8, C 1 or 3 as `form` says.

    With `size`, the centre square is scaled to it. Alpha is dropped over a white background, 16 bits are scaled to 8.

    Raises:
        Exception: Pillow raises all kinds on broken files.
    """
    image, ops, formats = _pillow()
    with image.open(file, formats=formats) as picture:
        if size is not None:
            picture.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size, not below
        ops.exif_transpose(picture, in_place=True)
        plain = _plain(picture)
    if size is not None:
        plain = ops.fit(plain, (size, size))
    if plain.size != (form.width, form.height):
        raise ValueError("{} x {} pixels where the header says {} x {}".format(*plain.size, *form[:2]))
    if form.grey:
        return np.asarray(plain)[None]
    return np.asarray(plain.convert("RGB")).transpose(2, 0, 1)


def reason(error: Exception) -> str:
    """What is wrong with a file, in a few words."""
    if type(error).__name__ == "UnidentifiedImageError":  # its text holds an object's address
        return "no format that Pillow knows"
    return str(error) or type(error).__name__


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
