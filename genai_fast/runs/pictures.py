"""Pictures of what a model makes, and of how it learned: grids, latent planes, curves, as PNG files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from genai_fast import atomic_files
from genai_fast.errors import require
from genai_fast.evaluation import key

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


def spectrograms(features: torch.Tensor, path: Path, columns: int | None = None) -> torch.Tensor:
    """Write spectrograms [N, mels, frames] in [0, 1] as a grid in colours from black to white, low bands at the bottom.

    Returns: as `grid`.
    """
    colours = require("matplotlib", "train").colormaps["magma"]
    values = _bytes(features).flip(1)
    table = torch.tensor(colours(range(256)))[:, :3].float()
    images = table[values.long()].permute(0, 3, 1, 2)
    # A frame is wide and a band low: pictures as broad as high show both.
    wide = max(1, round(features.shape[1] / features.shape[2]))
    return grid(images.repeat_interleave(wide, 3), path, columns)


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
    figure = _figure((7, 6))
    axes = figure.subplots()
    colours = require("matplotlib", "train").colormaps["tab10" if len(classes) <= 10 else "nipy_spectral"]
    points, labels = points.detach().float().cpu(), labels.cpu()
    for k, name in enumerate(classes):
        of_class = points[labels == k]
        colour = colours(k if len(classes) <= 10 else k / len(classes))
        axes.scatter(of_class[:, 0], of_class[:, 1], s=5, color=colour, label=_plain(name), linewidths=0)
    axes.set(xlabel="$z_1$", ylabel="$z_2$", title=_plain(title), aspect="equal")
    axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3, frameon=False)
    _write(figure, path)


def curves(records: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Write a plot of a run's figures over its epochs, one panel per figure: in training, and on held-out data.

    Args:
        records: of metrics.jsonl, those of kind "epoch". Values that are not finite leave gaps.
    """
    panels = list(dict.fromkeys(name for record in records for part in _PARTS for name in record[part]))
    columns = max(1, min(3, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = _figure((4 * columns, 0.4 + 2.6 * rows))
    figure.suptitle(_plain(title), fontsize=9)
    every = figure.subplots(rows, columns, squeeze=False).flat
    for axes, name in itertools.zip_longest(every, panels):
        if name is None:
            axes.set_axis_off()
            continue
        for part, label in _PARTS.items():
            found = {r["epoch"]: r[part][name] for r in records if name in r[part]}
            if found:  # a single epoch has no line, so its point is marked
                values = [math.nan if value is None else value for value in found.values()]
                axes.plot([*found], values, label=label, lw=1.2, marker="." if len(found) < 20 else "")
        axes.set_title(key.name_of(name), fontsize=9)
        axes.set_xlabel("epoch", fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=7, frameon=False)
        axes.tick_params(labelsize=7)
    _write(figure, path)


_PARTS = {"train": "training", "validation": "held out"}


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def _figure(size: tuple[float, float]) -> Any:
    require("matplotlib.backends.backend_agg", "train")
    # A figure of its own: pyplot would choose a window system for the whole process.
    return require("matplotlib.figure", "train").Figure(figsize=size, dpi=120, layout="constrained")


def _write(figure: Any, path: Path) -> None:
    with atomic_files.whole(path) as hidden:
        figure.savefig(hidden, format="png")
