"""The commands that turn pictures into codes and back: compress, decompress."""

from __future__ import annotations

import argparse
import math

import torch

from genai_fast import data
from genai_fast.cli.checks import at_least, check_parent, free_path, opened, replaced_note
from genai_fast.cli.images import write_pictures
from genai_fast.errors import UsageError
from genai_fast.evaluation import psnr
from genai_fast.models.common import latents
from genai_fast.models.common.protocol import Encodes
from genai_fast.models.registry import RECIPES
from genai_fast.runs import codes
from genai_fast.runs.image_evaluation import decode
from genai_fast.runs.run import Opened
from genai_fast.training.batches import batch_for

_AT_ONCE = 100  # images that are encoded at a time


def run_compress(options: argparse.Namespace) -> int:
    if options.count is not None:
        at_least("--count", options.count, 1)
    options.out = free_path(options.out, "codes.safetensors")
    check_parent(options.out)
    if options.out.suffix != ".safetensors":
        raise UsageError(f"--out: expected the name of a .safetensors file, got {options.out}")
    run, replaced = _coder(options), replaced_note(options.out)
    source = options.data or run.config.data
    images = data.load(source, run.config.size or None if source == run.config.data else run.shape[1])
    if images.shape != run.shape:
        raise UsageError(f"--data: expected images of shape {run.shape} as {run.folder} takes, got {images.shape}")
    count = min(options.count or len(images), len(images))
    found = []
    with torch.no_grad(), latents.evaluating(run.model):
        for start in range(0, count, _AT_ONCE):
            code = run.model.encode(*batch_for(run.model, images, slice(start, min(start + _AT_ONCE, count))))
            found.append(code if isinstance(code, torch.Tensor) else code[0])
    size = codes.write(options.out, torch.cat(found), run.model, run.shape, options.bits)
    shown = min(count, 1000)
    again = decode(run.model, run.shape, codes.read(options.out, run.model, run.shape)[:shown])
    close = psnr(again, images.batch(slice(0, shown)))
    pixels, bytes_each = math.prod(run.shape), run.model.latent * options.bits // 8
    print(
        f"{options.out}{replaced}: {count} images of {images.name} in {size:,} bytes, {bytes_each} for each image of"
        f" {pixels:,} ({pixels / bytes_each:.1f} times less); PSNR {close:.1f} dB"
    )
    return 0


def run_decompress(options: argparse.Namespace) -> int:
    options.out = free_path(options.out, "decompressed")
    run = _coder(options)
    z = codes.read(options.codes, run.model, run.shape)
    if not len(z):
        raise UsageError(f"{options.codes}: expected at least one code, got none")
    what = f"{len(z)} images of {options.codes}, by {run.folder}"
    write_pictures(options.out, lambda: decode(run.model, run.shape, z), what)
    return 0


def _coder(options: argparse.Namespace) -> Opened:
    """A run of images whose codes decode without a label."""
    run = opened(options, options.command, Encodes)
    if RECIPES[run.recipe].sounds or run.classes:
        raise UsageError(
            f"{run.folder}: expected a run of an autoencoder or VAE of images without classes, got one of {run.recipe}"
        )
    return run
