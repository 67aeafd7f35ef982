"""The commands that draw pictures: sample, interpolate, inpaint, reconstruct, translate, upscale."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import torch

from genai_fast import data
from genai_fast.cli import labelled, sounds
from genai_fast.cli.checks import (
    at_least,
    check_parent,
    check_png,
    check_seed,
    free_path,
    labels_of,
    opened,
    replaced_note,
)
from genai_fast.contract import offers
from genai_fast.data.picture import read_light, read_picture
from genai_fast.errors import UsageError
from genai_fast.models import slerp
from genai_fast.models.common import latents
from genai_fast.models.common.protocol import (
    Draws,
    DrawsWaves,
    Encodes,
    Inpaints,
    Interpolates,
    Reconstructs,
    Translates,
    Upscales,
)
from genai_fast.models.registry import RECIPES
from genai_fast.runs import pictures
from genai_fast.runs.image_evaluation import decode, generate, shown, upscaled
from genai_fast.runs.run import Opened
from genai_fast.runs.translation_evaluation import translate
from genai_fast.training.batches import batch_for

_MOST = 1000  # held-out images whose latents are compared
_AT_ONCE = 100  # images that are read and written at a time


def run_sample(options: argparse.Namespace) -> int:
    at_least("--count", 64 if options.count is None else options.count, 1)
    check_seed(options.seed)
    run = opened(options, "sample", Draws, DrawsWaves)
    _truncate(run, options.truncation)
    if RECIPES[run.recipe].sounds or RECIPES[run.recipe].waves:
        if options.classes is not None:
            raise UsageError(
                f"--classes: expected a run of a model of images, got one of {run.recipe}; remedy: --class"
            )
        return sounds.sample(run, options)
    if options.classes is not None:
        return labelled.write(run, options)
    count = options.count or 64
    options.out = free_path(options.out, "grid.png")
    labels = labels_of(run, options.label, count)
    draw = partial(generate, run.model, run.shape, count, options.seed, labels)
    write_pictures(options.out, draw, f"{count} samples of {run.folder}")
    return 0


def write_pictures(out: Path, draw: Callable[[], torch.Tensor], what: str) -> None:
    """Write images [N, C, H, W] that `draw` makes once `out` is known to serve: a PNG file, or a new folder."""
    check_parent(out)
    picture = out.suffix.lower() == ".png"
    if not picture and out.suffix:
        raise UsageError(f"--out: expected the name of a PNG file or of a folder, got {out}")
    if not picture and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out: expected a new or empty folder, got {out}; remedy: another name")
    replaced, images = replaced_note(out), draw()
    if picture:
        pictures.grid(images, out)
    else:
        out.mkdir(exist_ok=True)
        for k, image in enumerate(images):
            pictures.single(image, out / f"{k:06d}.png")
    print(f"{out}{replaced}: {what}")


def _truncate(run: Opened, truncation: float | None) -> None:
    if truncation is None:
        return
    if not hasattr(run.model, "truncation"):
        raise UsageError(f"--truncation: expected a run of stylegan2, got one of {run.recipe}; remedy: omit it")
    if not 0 <= truncation <= 1:
        raise UsageError(f"--truncation: expected a number from 0 to 1, got {truncation:g}")
    run.model.truncation = truncation


def run_interpolate(options: argparse.Namespace) -> int:
    at_least("--pairs", options.pairs, 1)
    at_least("--steps", options.steps, 2)
    check_seed(options.seed)
    run = opened(options, "interpolate", Draws, Interpolates)
    if RECIPES[run.recipe].sounds:
        if options.traverse:
            raise UsageError(
                f"--traverse: expected a run of a model of images, got one of {run.recipe}; remedy: omit it"
            )
        return sounds.interpolate(run, options)
    if options.between:
        raise UsageError(f"--between: expected a run of a model of sounds, got one of {run.recipe}; remedy: omit it")
    options.out = free_path(options.out, "interpolation.png")
    check_png(options.out)
    if not offers(run.model, Draws):
        return _between_pictures(run, options)
    replaced = replaced_note(options.out)
    if options.traverse:
        ways, what = _traversal(run, options), "latent traversals"
    else:
        a, b = latents.normal(2 * options.pairs, run.model.latent, options.seed).chunk(2)
        ways, what = [slerp(a, b, t) for t in torch.linspace(0, 1, options.steps).tolist()], "interpolations"
    labels = labels_of(run, options.label, options.pairs)
    if labels is None and run.classes:  # a class a row, not a picture
        labels = torch.arange(options.pairs) % len(run.classes)
    labels = None if labels is None else labels.repeat_interleave(options.steps)
    images = decode(run.model, run.shape, torch.stack(ways, dim=1).flatten(0, 1), labels)
    pictures.grid(images, options.out, columns=options.steps)
    print(f"{options.out}{replaced}: {options.pairs} {what} of {run.folder}")
    return 0


def _traversal(run: Opened, options: argparse.Namespace) -> list[torch.Tensor]:
    """Latents [pairs, latent] for each step: one dimension of a drawn z goes from -3 to 3 in each row.

    Of a VAE the rows are the dimensions that tell most of held-out images, by the variance of their means.
    """
    if options.pairs > run.model.latent:
        raise UsageError(f"--pairs: expected at most the {run.model.latent} dimensions of z, got {options.pairs}")
    z = latents.normal(1, run.model.latent, options.seed)
    dimensions = torch.arange(run.model.latent)
    if offers(run.model, Encodes):
        images = _images_for(run, run.config.data)
        with torch.no_grad():
            mu, _ = run.model.encode(*batch_for(run.model, images, slice(0, _MOST)))
        dimensions = mu.var(0).argsort(descending=True)
    rows = torch.arange(options.pairs)
    ways = [z.repeat(options.pairs, 1) for _ in range(options.steps)]
    for way, value in zip(ways, torch.linspace(-3, 3, options.steps), strict=True):
        way[rows, dimensions[: options.pairs]] = value
    return ways


def _between_pictures(run: Opened, options: argparse.Namespace) -> int:
    """Between pairs of held-out images, for a model that encodes images and does not draw."""
    if options.traverse:
        raise UsageError(
            f"--traverse: expected a run of a model that can sample, got one of {run.recipe}; remedy: omit it"
        )
    replaced, images = replaced_note(options.out), _images_for(run, run.config.data)
    if len(images) < 2 * options.pairs:
        raise UsageError(
            f"--pairs: expected at most {len(images) // 2}, half of the held-out images, got {options.pairs}"
        )
    (x,) = batch_for(run.model, images, slice(0, 2 * options.pairs))
    made = torch.cat([run.model.interpolate(a, b, options.steps) for a, b in zip(x[::2], x[1::2], strict=True)])
    pictures.grid(shown(run.model, made), options.out, columns=options.steps)
    print(f"{options.out}{replaced}: {options.pairs} interpolations between held-out images by {run.folder}")
    return 0


def run_inpaint(options: argparse.Namespace) -> int:
    at_least("--count", options.count, 1)
    at_least("--steps", options.steps, 1)
    check_seed(options.seed)
    options.out = free_path(options.out, "inpainted.png")
    check_png(options.out)
    if (options.box is None) == (options.mask is None):
        raise UsageError("expected either --box LEFT,TOP,WIDTH,HEIGHT or --mask FILE")
    run, replaced = opened(options, "inpaint", Inpaints), replaced_note(options.out)
    images = _images_for(run, options.data)
    count = min(options.count, len(images))
    missing = _box(options.box, run.shape) if options.mask is None else _mask(options.mask, run.shape)
    mask = missing.expand(count, 1, *run.shape[1:])
    batch = batch_for(run.model, images, slice(0, count))
    repaired = run.model.inpaint(batch[0], mask, *batch[1:], steps=options.steps, seed=options.seed)
    x, repaired = (shown(run.model, x) for x in (batch[0], repaired))
    pictures.grid(torch.cat([x, torch.where(mask, 0.5, x), repaired]), options.out, columns=count)
    rows = "original, damaged and repaired"
    print(f"{options.out}{replaced}: {count} images of {images.name}: {rows} by {run.folder}, one row each")
    return 0


def run_reconstruct(options: argparse.Namespace) -> int:
    at_least("--count", options.count, 1)
    run = opened(options, "reconstruct", Reconstructs)
    if RECIPES[run.recipe].sounds:
        return sounds.reconstruct(run, options)
    options.out = free_path(options.out, "reconstructed.png")
    check_png(options.out)
    replaced = replaced_note(options.out)
    images = _images_for(run, options.data or run.config.data)
    batch = batch_for(run.model, images, slice(0, min(options.count, len(images))))
    with latents.evaluating(run.model):
        pair = torch.cat([batch[0], run.model.reconstruct(*batch)])
    pictures.grid(shown(run.model, pair), options.out, columns=len(batch[0]))
    what = f"{len(batch[0])} images of {images.name} and their reconstructions"
    print(f"{options.out}{replaced}: {what} by {run.folder}, one row each")
    return 0


def run_translate(options: argparse.Namespace) -> int:
    if options.count is not None:
        at_least("--count", options.count, 1)
    options.out = free_path(options.out, "translated")
    check_parent(options.out)
    picture = options.out.suffix.lower() == ".png"
    if not picture and options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UsageError(
            f"--out: expected a PNG file, or a new or empty folder, got {options.out}; remedy: another name"
        )
    run, replaced = opened(options, "translate", Translates), replaced_note(options.out)
    if options.to not in run.model.targets:
        raise UsageError(f"--to: expected {' or '.join(run.model.targets)} for {run.recipe}, got {options.to}")
    images = data.load(options.data, run.shape[1])
    images = images.in_colour() if run.shape[0] == 3 else images
    if images.shape != run.shape:
        raise UsageError(f"--data: expected images of shape {run.shape} as {run.folder} takes, got {images.shape}")
    count = min(options.count or len(images), len(images))
    if picture:
        x = images.batch(slice(0, count))
        pictures.grid(torch.cat([x, translate(run.model, x, options.to)]), options.out, columns=count)
        what = "and their translations, one row each"
    else:
        names = [PurePosixPath(name).with_suffix(".png") for name in images.names[:count]]
        if len(set(names)) < count:  # not known, or several that differ in their suffix alone
            names = [PurePosixPath(f"{k:06d}.png") for k in range(count)]
        for part in torch.arange(count).split(_AT_ONCE):
            for k, image in zip(part.tolist(), translate(run.model, images.batch(part), options.to), strict=True):
                path = options.out / names[k]
                path.parent.mkdir(parents=True, exist_ok=True)
                pictures.single(image, path)
        what = "translated"
    print(f"{options.out}{replaced}: {count} images of {images.name} {what}, to {options.to} by {run.folder}")
    return 0


def run_upscale(options: argparse.Namespace) -> int:
    options.out = free_path(options.out, "upscaled.png")
    check_png(options.out)
    run, replaced = opened(options, "upscale", Upscales), replaced_note(options.out)
    x = torch.from_numpy(read_picture(options.picture, grey=run.shape[0] == 1)).float() / 255
    made = upscaled(run.model, x)
    pictures.single(made, options.out)
    sizes = " to ".join(f"{image.shape[-1]} x {image.shape[-2]}" for image in (x, made))
    print(f"{options.out}{replaced}: {options.picture} enlarged from {sizes} pixels by {run.folder}")
    return 0


def _images_for(run: Opened, source: str) -> data.Images:
    """Images of the run's size; of the data that it was trained on those that were held out."""
    own = source == run.config.data
    images = data.load(source, run.config.size or None if own else run.shape[1])
    if images.shape != run.shape:
        raise UsageError(f"--data: expected images of shape {run.shape} as {run.folder} makes, got {images.shape}")
    return images.split(run.config.validation, run.config.seed)[1] if own else images


def _box(text: str, shape: tuple[int, int, int]) -> torch.Tensor:
    """[1, 1, H, W], True in the box."""
    try:
        left, top, width, height = (int(x) for x in text.split(","))
    except ValueError:
        raise UsageError(f"--box: expected LEFT,TOP,WIDTH,HEIGHT, got {text}") from None
    if not (0 <= left < left + width <= shape[2] and 0 <= top < top + height <= shape[1]):
        raise UsageError(f"--box: expected a box inside {shape[2]} x {shape[1]} pixels, got {text}")
    mask = torch.zeros(1, 1, *shape[1:], dtype=torch.bool)
    mask[..., top : top + height, left : left + width] = True
    return mask


def _mask(path: Path, shape: tuple[int, int, int]) -> torch.Tensor:
    """[1, 1, H, W], True where the picture is light."""
    mask = torch.from_numpy(read_light(path, shape[2], shape[1]))[None, None] > 127
    if not mask.any():
        raise UsageError(f"--mask: expected white where pixels are missing, got none in {path}")
    return mask
