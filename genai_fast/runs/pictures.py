"""Pictures of what a model makes: grids and latent planes, as PNG files."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from genai_fast import atomic_files
from genai_fast.errors import require

_SCALE_TO = 32  # pixels: smaller images are enlarged by a whole factor to at least this size
_GAP = 2  # pixels between images


def grid(images: torch.Tensor, path: Path, columns: int | None = None) -> torch.Tensor:
    """Write images [N, C, H, W], C 1 or 3, floats clipped to [0, 1], as a grid; square by default.

    Returns: the grid's pixels [C, H', W'], uint8.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows, scale = math.ceil(count / columns), math.ceil(_SCALE_TO / min(height, width))
    pixels = _bytes(images).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    height, width = height * scale + _GAP, width * scale + _GAP
    sheet = torch.full((channels, rows * height + _GAP, columns * width + _GAP), 64, dtype=torch.uint8)
    for i, x in enumerate(pixels):
        top, left = (i // columns) * height + _GAP, (i % columns) * width + _GAP
        sheet[:, top : top + x.shape[1], left : left + x.shape[2]] = x
    _save(sheet, path)
    return sheet


def single(image: torch.Tensor, path: Path) -> None:
    """Write one image [C, H, W], C 1 or 3, floats clipped to [0, 1], pixel for pixel."""
    _save(_bytes(image), path)


def _bytes(images: torch.Tensor) -> torch.Tensor:
    return images.detach().float().cpu().nan_to_num(0.0).clamp(0, 1).mul(255).round().byte()


def _save(image: torch.Tensor, path: Path) -> None:
    array = image.permute(1, 2, 0).numpy()
    picture = require("PIL.Image", "train").fromarray(array if len(image) == 3 else array[:, :, 0])
    with atomic_files.whole(path) as hidden:
        picture.save(hidden, "PNG")


def plane(points: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], path: Path, title: str) -> None:
    """Write points [N, 2] as a scatter plot, coloured by labels [N], with a legend."""
    figures = require("matplotlib.figure", "train")
    require("matplotlib.backends.backend_agg", "train")
    # A figure of its own: pyplot would choose a window system for the whole process.
    figure = figures.Figure(figsize=(7, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    colours = require("matplotlib", "train").colormaps["tab10" if len(classes) <= 10 else "nipy_spectral"]
    points, labels = points.detach().float().cpu(), labels.cpu()
    for k, name in enumerate(classes):
        of_class = points[labels == k]
        colour = colours(k if len(classes) <= 10 else k / len(classes))
        axes.scatter(of_class[:, 0], of_class[:, 1], s=5, color=colour, label=name.replace("$", r"\$"), linewidths=0)
    axes.set(xlabel="$z_1$", ylabel="$z_2$", title=title, aspect="equal")
    axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3, frameon=False)
    with atomic_files.whole(path) as hidden:
        figure.savefig(hidden, format="png")
