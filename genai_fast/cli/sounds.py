"""sample, interpolate and reconstruct, of a model of sounds: each writes WAV, and a PNG of spectrograms beside it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from genai_fast.cli.checks import check_parent, free_path, labels_of, replaced_note
from genai_fast.errors import UsageError
from genai_fast.models import slerp
from genai_fast.models.common import latents
from genai_fast.models.registry import RECIPES
from genai_fast.runs import wave_task
from genai_fast.runs.audio_evaluation import drawn, pairs, write
from genai_fast.runs.audio_task import clips_for, first_clip, spectrum_of
from genai_fast.runs.image_evaluation import decode
from genai_fast.runs.run import Opened


def sample(run: Opened, options: argparse.Namespace) -> int:
    """Samples one after the other in a WAV file, or each in a file of a folder."""
    count = options.count or 16
    out = free_path(options.out, "samples.wav")
    labels = labels_of(run, options.label, count)  # of spectrograms there are none: an error if a class is asked for
    check_parent(out)
    if out.suffix and out.suffix.lower() != ".wav":
        raise UsageError(f"--out: expected the name of a WAV file or of a folder, got {out}")
    if not out.suffix and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out: expected a new or empty folder, got {out}; remedy: another name")
    replaced, save = replaced_note(out), _writer(run)
    if RECIPES[run.recipe].waves:
        made = wave_task.drawn(run.model, run.config, count, options.seed, labels)
    else:
        made = drawn(run.model, run.shape, count, options.seed)
    if out.suffix:
        save(made, out)
    else:
        out.mkdir(exist_ok=True)
        for k, one in enumerate(made):
            save(one[None], out / f"{k:06d}.wav")
    print(f"{out}{replaced}: {count} samples of {run.folder}, and {'pictures' if not out.suffix else _picture(out)}")
    return 0


def _writer(run: Opened) -> Callable[[torch.Tensor, Path], torch.Tensor]:
    """What writes sounds as this run's model makes them, and their picture."""
    if RECIPES[run.recipe].waves:
        return lambda codes, path: wave_task.write_codes(codes, run.config.rate, path)
    return lambda features, path: write(features, spectrum_of(run.config), path)


def interpolate(run: Opened, options: argparse.Namespace) -> int:
    """From one sound to another, or between pairs of latents: a row of the picture for each pair."""
    out, steps = _wav(options.out, "interpolation.wav"), options.steps
    labels_of(run, options.label, options.pairs)
    replaced = replaced_note(out)
    if options.between:
        a, b = (first_clip(path, run.config) for path in options.between)
        features = run.model.interpolate(a, b, steps)
        what = " to ".join(map(str, options.between))
    else:
        a, b = latents.normal(2 * options.pairs, run.model.latent, options.seed).chunk(2)
        ways = [slerp(a, b, t) for t in torch.linspace(0, 1, steps).tolist()]
        features = decode(run.model, run.shape, torch.stack(ways, dim=1).flatten(0, 1)) * 2 - 1
        what = f"{options.pairs} interpolations"
    write(features, spectrum_of(run.config), out, columns=steps)
    print(f"{out}{replaced}: {what} by {run.folder}, {steps} steps, and {_picture(out)}")
    return 0


def reconstruct(run: Opened, options: argparse.Namespace) -> int:
    """Sounds, each before what the model makes of it; by default those that were held out."""
    out, source = _wav(options.out, "reconstructed.wav"), options.data or run.config.data
    replaced, clips = replaced_note(out), clips_for(run.config, source)
    if source == run.config.data:
        clips = clips.split(run.config.validation, run.config.seed)[1]
    x = clips.batch(slice(0, min(options.count, len(clips))), signed=True)
    pairs(run.model, x, spectrum_of(run.config), out)
    what = f"{len(x)} sounds of {clips.name}, each before its reconstruction"
    print(f"{out}{replaced}: {what} by {run.folder}, and {_picture(out)}")
    return 0


def _wav(out: Path | None, default: str) -> Path:
    path = free_path(out, default)
    check_parent(path)
    if path.suffix.lower() != ".wav":
        raise UsageError(f"--out: expected the name of a WAV file, got {path}")
    return path


def _picture(out: Path) -> str:
    return f"their spectrograms in {out.with_suffix('.png').name}"
