"""Labelled images that a conditional model makes: a folder of them, and whether they help a classifier."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch

from genai_fast import atomic_files, data
from genai_fast.cli.checks import at_least, check_parent, check_seed, opened
from genai_fast.data import Images
from genai_fast.errors import UsageError
from genai_fast.evaluation.augmentation import Accuracies, augmentation_study
from genai_fast.models.common.protocol import Draws
from genai_fast.models.registry import RECIPES
from genai_fast.runs import pictures
from genai_fast.runs.image_evaluation import generate
from genai_fast.runs.run import Opened

_NO_FOLDERS = ("", ".", "..")


def chosen(run: Opened, names: str) -> list[int]:
    """Labels of classes by their names, with commas between; "all": of all."""
    if not run.classes:
        raise UsageError(f"--classes: expected a run of a conditional model, got one of {run.recipe}; remedy: omit it")
    wanted = run.classes if names == "all" else tuple(names.split(","))
    unknown = [name for name in wanted if name not in run.classes]
    if unknown or len(set(wanted)) < len(wanted):
        raise UsageError(f"--classes: expected all, or some of {', '.join(run.classes)}, each once, got {names}")
    return [run.classes.index(name) for name in wanted]


def of_class(run: Opened, label: int, count: int, seed: int) -> torch.Tensor:
    """`count` images [N, C, H, W] in [0, 1] of a class, by a seed that other classes do not have."""
    return generate(run.model, run.shape, count, (seed + label) % 2**63, torch.full((count,), label))


def write(run: Opened, options: argparse.Namespace) -> int:
    """A folder of pictures with a subfolder for each class, as `train` reads it."""
    labels, folder = chosen(run, options.classes), options.out
    if options.label is not None:
        raise UsageError("expected --class NAME or --classes NAMES, got both")
    if folder is None or folder.suffix:
        raise UsageError(f"--out: expected the name of a folder with --classes, got {folder}")
    check_parent(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--out: expected a new or empty folder, got {folder}; remedy: another name")
    names = [run.classes[label] for label in labels]
    if wrong := [name for name in names if name in _NO_FOLDERS or "/" in name or "\0" in name]:
        raise UsageError(
            f"--classes: expected names that a folder can have, got {wrong[0]!r}; remedy: --class and --out"
        )
    count = options.count or 64
    for label, name in zip(labels, names, strict=True):
        (folder / name).mkdir(parents=True)
        for k, image in enumerate(of_class(run, label, count, options.seed)):
            pictures.single(image, folder / name / f"{k:06d}.png")
    print(f"{folder}: {count} samples of {run.folder} of each of {len(labels)} classes, a subfolder each")
    return 0


def study(options: argparse.Namespace) -> int:
    at_least("--count", options.count, 1)
    at_least("--seeds", options.seeds, 1)
    at_least("--steps", options.steps, 1)
    check_seed(options.seed)
    run = opened(options, "sample", Draws)
    if RECIPES[run.recipe].sounds or not run.classes:
        raise UsageError(f"{run.folder}: expected a run of a conditional model of images, got one of {run.recipe}")
    if options.out is not None:
        check_parent(options.out)
    images = data.load(run.config.data, run.config.size or None)
    if (images.shape, images.classes) != (run.shape, run.classes):
        raise UsageError(
            f"{run.config.data}: expected the images that {run.folder} was trained on, {run.shape}, got {images.shape}"
        )
    real, test = images.split(run.config.validation, run.config.seed)
    found = augmentation_study(
        real, _generated(run, images, options.count, options.seed), test, range(options.seeds), options.steps
    )
    print(_text(run, found, len(test)))
    if options.out is not None:
        record = [{"name": f.name, "images": f.images, "accuracies": f.each} for f in found]
        atomic_files.write_text(options.out, json.dumps({"test_images": len(test), "trained_on": record}) + "\n")
    return 0


def _generated(run: Opened, like: Images, count: int, seed: int) -> Images:
    """`count` images of each class, rounded as pictures are."""
    labels = range(len(run.classes))
    made = torch.cat([of_class(run, label, count, seed) for label in labels]).mul(255).round().byte()
    name = f"samples of {run.folder}"
    return Images(name, made, torch.arange(len(run.classes)).repeat_interleave(count), like.classes)


def _text(run: Opened, found: Sequence[Accuracies], test: int) -> str:
    width = max(len(f.name) for f in found)
    lines = [f"accuracy on {test} held-out images of {run.folder}, {len(found[0].each)} classifiers each"]
    for f in found:
        spread = "" if len(f.each) == 1 else f" +- {f.deviation:.4f}, {min(f.each):.4f} to {max(f.each):.4f}"
        lines.append(f"  {f.name:<{width}}  {f.images:>6} images  {f.mean:.4f}{spread}")
    return "\n".join(
        [*lines, "+-: standard deviation over the classifiers' seeds; the generator saw the real images alone"]
    )
