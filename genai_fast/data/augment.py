"""Random changes to images that leave what they show: mirrored, shifted, turned, scaled, in another light."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from genai_fast.errors import UsageError

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's "L"


class _Draw(NamedTuple):
    numbers: np.random.Generator
    total: int  # rows of the batch
    rows: slice | np.ndarray  # those that are changed


@dataclass(frozen=True)
class Augment:
    """What is done to each image of a batch, independently; all zero: nothing, bit for bit.

    Calling it with [B, C, H, W] floats in [0, 1] gives the same shape in [0, 1]. Randomness is a function of (seed,
    epoch, batch's number) alone, so a resumed run draws what a straight one does.

    Args:
        flip: probability of a left-right mirror image.
        crop: pixels of reflected border, out of which a window of the image's own size is cut anywhere.
        rotate: largest angle in degrees, both ways; bilinear, borders reflected.
        zoom: largest share by which the image is scaled up or down, about its centre; the factor's logarithm is
            uniform from log(1 - zoom) to -log(1 - zoom). Bilinear, borders reflected.
        jitter: strength s of brightness, contrast and saturation (colour only), each a factor from 1 - s to 1 + s.
    """

    flip: float = 0.0
    crop: int = 0
    rotate: float = 0.0
    jitter: float = 0.0
    zoom: float = 0.0

    def __post_init__(self) -> None:
        for name, high in (("flip", 1), ("crop", math.inf), ("rotate", 180), ("jitter", 1), ("zoom", 0.9)):
            value = getattr(self, name)
            if not 0 <= value <= high or (name == "crop" and value != int(value)):
                kind = "a whole number" if name == "crop" else "a number"
                raise UsageError(f"{name}: expected {kind} from 0 to {high:g}, got {value!r}")

    def __bool__(self) -> bool:
        """Whether it does anything."""
        return any((self.flip, self.crop, self.rotate, self.jitter, self.zoom))

    def __call__(
        self, x: torch.Tensor, seed: int, epoch: int, batch: int, rows: tuple[int, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """x may be some rows of a batch: (rows of the batch, those of x in it); each is changed as in the whole."""
        if self.crop >= min(x.shape[2:]):
            size = "{} x {}".format(*x.shape[:1:-1])
            raise UsageError(f"crop: expected less than the images' side ({size}), got {self.crop}")
        # One number more than an epoch's order has, and none of them 0: NumPy takes (a, b) and (a, b, 0) for the same.
        numbers = np.random.default_rng((seed, epoch + 1, batch + 1))
        draw = _Draw(numbers, len(x), slice(None)) if rows is None else _Draw(numbers, rows[0], rows[1].numpy())
        if self.flip or self.crop:
            x = self._shifted(x, draw)
        if self.rotate or self.zoom:
            x = self._turned(x, draw)
        return self._jittered(x, draw) if self.jitter else x

    def _shifted(self, x: torch.Tensor, draw: _Draw) -> torch.Tensor:
        """Mirrored and cropped: one gather, values as they were."""
        count, channels, height, width = x.shape
        flips = draw.numbers.random((draw.total, 1))[draw.rows] < self.flip
        down, right = draw.numbers.integers(-self.crop, self.crop + 1, (2, draw.total, 1))[:, draw.rows]
        columns = np.where(flips, np.arange(width)[::-1], np.arange(width))
        rows, columns = _reflect(np.arange(height) + down, height), _reflect(columns + right, width)
        source = torch.from_numpy(rows[:, :, None] * width + columns[:, None, :]).to(x.device)
        source = source.view(count, 1, -1).expand(-1, channels, -1)
        return x.flatten(2).gather(2, source).view_as(x)

    def _turned(self, x: torch.Tensor, draw: _Draw) -> torch.Tensor:
        angle = np.radians(draw.numbers.uniform(-self.rotate, self.rotate, draw.total)[draw.rows])
        cos, sin, zero, aspect = np.cos(angle), np.sin(angle), np.zeros(len(x)), x.shape[3] / x.shape[2]
        if self.zoom:
            most = -np.log1p(-self.zoom)
            shrunk = np.exp(draw.numbers.uniform(-most, most, draw.total)[draw.rows])
            cos, sin = cos * shrunk, sin * shrunk  # the places that are looked at; larger ones make it smaller
        # Coordinates go from -1 to 1 along both sides: a turn must undo the sides' ratio.
        rows = [[cos, -sin / aspect, zero], [sin * aspect, cos, zero]]
        theta = torch.from_numpy(np.array(rows).transpose(2, 0, 1)).to(x)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        turned = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        return turned.clamp_(0.0, 1.0)  # weights of four neighbours may sum to a rounding more than 1

    def _jittered(self, x: torch.Tensor, draw: _Draw) -> torch.Tensor:
        factors = draw.numbers.uniform(1 - self.jitter, 1 + self.jitter, (3, draw.total, 1, 1, 1))[:, draw.rows]
        brightness, contrast, saturation = torch.from_numpy(factors).to(x)
        if x.shape[1] == 3:
            grey = (x * x.new_tensor(_LUMA).view(3, 1, 1)).sum(1, keepdim=True)
            x = torch.lerp(grey, x, saturation)
        mean = x.mean((1, 2, 3), keepdim=True)
        return torch.lerp(mean, x, contrast).mul_(brightness).clamp_(0.0, 1.0)


def _reflect(position: np.ndarray, size: int) -> np.ndarray:
    """-1 is 1, size is size - 2: the border pixel is not repeated. Within one size of the image."""
    position = np.abs(position)
    return np.where(position >= size, 2 * (size - 1) - position, position)
