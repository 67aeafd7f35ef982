"""What is looked at while a model learns to translate: pictures there and back, and figures on held-out images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from genai_fast.config import TranslationConfig
from genai_fast.data import Images
from genai_fast.evaluation import Classifier, SampleQuality, psnr, ssim, warnings_of
from genai_fast.runs import pictures
from genai_fast.runs.image_evaluation import shown
from genai_fast.training import distributed
from genai_fast.training.loop import Look
from genai_fast.training.tensorboard import Board

_COLUMNS = 12  # pictures of each set in a grid
_MOST = 1000  # images of a set that figures compare
_AT_ONCE = 100  # values of 32 x 32 images that are translated at a time, at most
_FROM = {"b": "a", "a": "b"}


class Sides(NamedTuple):
    """Both sets of images by "a" and "b", for training and held out; with `pairs`, those of one number are partners."""

    train: dict[str, Images]
    held_out: dict[str, Images]
    pairs: bool

    @property
    def labelled(self) -> bool:
        """Whether both sets are of the same classes."""
        a, b = self.train["a"], self.train["b"]
        return a.labels is not None and b.labels is not None and a.classes == b.classes and len(a.classes) > 1


def translate(model: nn.Module, x: torch.Tensor, to: str) -> torch.Tensor:
    """Translate images [N, C, H, W] in [0, 1], on the CPU, to set `to`, a few at a time."""
    device = next(model.parameters()).device
    at_once = max(1, _AT_ONCE * 32 * 32 // (x.shape[2] * x.shape[3]))
    parts = [shown(model, model.translate((part * 2 - 1).to(device), to)).cpu() for part in x.split(at_once)]
    return torch.cat(parts)


def draw(model: Any, sides: Sides, path: Path) -> torch.Tensor:
    """A grid of held-out images: what they are, what they become, and what comes back; of pairs the partner below."""
    rows = []
    for to in model.targets:
        x = sides.held_out[_FROM[to]].batch(slice(0, _COLUMNS))
        rows += [x, translate(model, x, to)]
        if sides.pairs:
            rows.append(sides.held_out[to].batch(slice(0, _COLUMNS)))
        elif _FROM[to] in model.targets:
            rows.append(translate(model, rows[-1], _FROM[to]))
    count = min(map(len, rows))
    return pictures.grid(torch.cat([row[:count] for row in rows]), path, columns=count)


class TranslationWatch:
    """Called at the end of an epoch: writes grids/epoch-<n>.png, to a board too; gives figures on held-out images.

    For each target, named by it: Fréchet distance between translated and real images; if both sets have the same
    classes, the accuracy of a classifier, trained on the target's real images, on translated images, on the same before
    they were translated, and on real ones; the difference of images that went there and back. Of pairs: L1, PSNR and
    SSIM to the partner.
    """

    def __init__(
        self, model: nn.Module, sides: Sides, config: TranslationConfig, folder: Path, board: Board | None = None
    ) -> None:
        self._model, self._sides, self._config = model, sides, config
        self._folder, self._board = folder, board
        self._quality: dict[str, SampleQuality] = {}
        self._judges: dict[str, tuple[Classifier, float]] = {}  # and its accuracy on held-out images

    def __call__(self, epoch: int, train: dict[str, float]) -> Look:
        """Figures and warnings of epoch `epoch`, whose mean losses in training were `train`."""
        config, draws = self._config, distributed.first()
        if draws and config.grid_every and epoch % config.grid_every == 0:
            path = self._folder / "grids" / f"epoch-{epoch:04d}.png"
            path.parent.mkdir(exist_ok=True)
            sheet = draw(self._model, self._sides, path)
            if self._board is not None:
                self._board.picture("samples", sheet)
        figures: dict[str, float] = {}
        warnings: list[str] = []
        if draws and config.quality_every and epoch % config.quality_every == 0:
            for to in self._model.targets:
                found, said = self._look(to)
                figures |= found
                warnings += [message for message in said if message not in warnings]
            distances = [figures[k] for k in figures if k.startswith("frechet_distance_")]
            if distances:
                figures = {"frechet_distance": sum(distances) / len(distances), **figures}
            if len(self._model.targets) == 1:
                figures.pop(f"frechet_distance_{self._model.targets[0]}", None)
        return Look(figures, warnings)

    def _look(self, to: str) -> tuple[dict[str, float], list[str]]:
        model, sides = self._model, self._sides
        given, wanted = sides.held_out[_FROM[to]], sides.held_out[to]
        x, real = (images.batch(slice(0, _MOST)) for images in (given, wanted))
        made, figures, warnings = translate(model, x, to), {}, []
        finite = bool(made.isfinite().all())
        said: dict[str, Any] = {"samples": made, "real": real}
        try:
            if to not in self._quality:
                self._quality[to] = SampleQuality(real)
            quality = self._quality[to].quality(made) if finite else {"frechet_distance": math.nan}
        except ValueError as error:  # too few images, too small or too large ones, or all alike
            warnings.append(f"no comparison of samples with held-out images: {error}")
        else:
            figures[f"frechet_distance_{to}"] = quality["frechet_distance"]
            said["diversity"] = quality.get("diversity")
        if sides.labelled and finite:
            judge, of_real = self._judge(to)
            figures[f"accuracy_{to}"] = judge.accuracy(made, given.labels[: len(x)])
            figures[f"accuracy_{to}_untranslated"] = judge.accuracy(x, given.labels[: len(x)])
            figures[f"accuracy_{to}_real"] = of_real
        if sides.pairs:
            figures |= {"l1": float((made - real).abs().mean()), "psnr": psnr(made, real), "ssim": ssim(made, real)}
        elif _FROM[to] in model.targets:
            again = translate(model, made, _FROM[to])
            figures[f"cycle_{_FROM[to]}"] = float((again - x).abs().mean())
        return figures, warnings + warnings_of(figures, **said)

    def _judge(self, to: str) -> tuple[Classifier, float]:
        """A classifier of set `to`, trained when it is first asked for, and its accuracy on held-out real images."""
        if to not in self._judges:
            real = self._sides.held_out[to]
            judge = Classifier(self._sides.train[to], self._config.seed)
            self._judges[to] = judge, judge.accuracy(real.batch(slice(0, _MOST)), real.labels[:_MOST])
        return self._judges[to]
