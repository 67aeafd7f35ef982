"""Training on sounds sample by sample: the data, the model that fits them, what is looked at and listened to."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.config import WaveformConfig
from genai_fast.data import audio
from genai_fast.data.audio import Spectrum
from genai_fast.errors import UsageError
from genai_fast.models.common.latents import evaluating
from genai_fast.models.registry import make
from genai_fast.runs import pictures
from genai_fast.runs.image_task import ImageTask
from genai_fast.training import distributed
from genai_fast.training.batches import Feed
from genai_fast.training.loop import Look, evaluate
from genai_fast.training.tensorboard import Board

SHOWN = 8  # sounds that are drawn after an epoch
_GAP = 0.2  # seconds of silence between the sounds of a file
_MELS, _WINDOW, _HOP = 64, 0.064, 0.008  # of the pictures: bands, seconds


def write_codes(codes: torch.Tensor, rate: int, path: Path) -> torch.Tensor:
    """Write mu-law codes [N, T] as a WAV file, one sound after the other, and a picture of their spectrograms.

    Returns: the picture's pixels [3, H, W], uint8.
    """
    x = audio.mu_law_decode(codes.cpu())
    audio.write_wav(path.with_suffix(".wav"), F.pad(x, (0, round(_GAP * rate))).flatten(), rate)
    spectrum = Spectrum(rate, _MELS, 2 * max(round(_WINDOW * rate / 2), 2), max(round(_HOP * rate), 1))
    features = audio.to_features(audio.mel_power(x, spectrum), spectrum.scale)
    return pictures.spectrograms(features * 0.5 + 0.5, path.with_suffix(".png"))


def drawn(model: nn.Module, settings: WaveformConfig, count: int, seed: int, labels: Any = None) -> torch.Tensor:
    """`count` sounds of a model as codes [count, T], of the length that its settings say."""
    with evaluating(model):
        return model.draw_codes(count, max(round(settings.seconds * settings.rate), 1), labels, seed=seed)


class WaveTask(ImageTask):
    """A recipe for sounds as they are, and its data: windows of mu-law codes."""

    def __init__(self, name: str, settings: WaveformConfig, resumed: Path | None = None) -> None:
        how = audio.treatment(settings.data, settings.rate, settings.trim)
        waves = audio.waves_of(
            audio.load(settings.data, how.rate, trim=how.trim, strict=settings.strict), settings.block
        )
        if settings.conditional and not waves.classes:
            raise UsageError(
                f"--conditional: expected sounds with classes, got none in {settings.data}; remedy: a folder with one"
                f" subfolder for each class, or omit it"
            )
        self.name, self.settings, self.waves = name, settings, waves
        self.train, self.validation = waves.split(settings.validation, settings.seed)
        self.about: dict[str, Any] = {"recipe": name, "shape": [settings.block], "windows": len(waves)}
        self.about |= {"classes": list(waves.classes) if settings.conditional else [], "data": _digest_of(waves)}

    @property
    def described(self) -> str:
        """The data in words."""
        seconds = [w.samples / self.settings.rate for w in (self.train, self.validation)]
        return f"{self.waves.name}: {seconds[0]:,.0f} seconds for training, {seconds[1]:,.0f} held out"

    def model(self) -> nn.Module:
        return make(self.name, self.settings, (self.settings.block,), len(self.about["classes"]))

    def feeds(self, model: nn.Module) -> tuple[Feed, Feed]:
        """For training and for validation."""
        size, seed, labels = self.settings.batch_size, self.settings.seed, bool(self.about["classes"])
        training = audio.WaveFeed(self.train, size, seed, labels=labels)
        training.steps  # noqa: B018  (says so where there is too little, before anything is written)
        self._held_out = audio.WaveFeed(self.validation, size, seed, model.reach - 1, labels)
        return training, self._held_out

    def watch(self, model: nn.Module, folder: Path, board: Board | None) -> Callable[[int, dict[str, float]], Look]:
        """Called at the end of an epoch: writes grids/epoch-<n>.wav and .png, to a board the picture; gives figures on
        held-out sounds."""

        def look(epoch: int, train: dict[str, float]) -> Look:
            every = self.settings.grid_every
            if distributed.first() and every and epoch % every == 0:
                path = folder / "grids" / f"epoch-{epoch:04d}.wav"
                path.parent.mkdir(exist_ok=True)
                sheet = write_codes(drawn(model, self.settings, SHOWN, seed=1), self.settings.rate, path)
                if board is not None:
                    board.picture("samples", sheet)
            figures = evaluate(model, self._held_out, self.settings)
            return Look({**figures, "bits_per_sample": figures["loss"] / math.log(2)}, [])

        return look

    def finish(self, model: nn.Module, folder: Path) -> None:
        write_codes(drawn(model, self.settings, SHOWN, seed=1), self.settings.rate, folder / "samples.wav")

    @staticmethod
    def open(
        name: str, settings: WaveformConfig, about: dict[str, Any], folder: Path
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A run's model, without its weights, and what else `Opened` says of it."""
        shape, classes = (settings.block,), tuple(about["classes"])
        return make(name, settings, shape, len(classes)), {"shape": shape, "classes": classes}


def _digest_of(waves: audio.Waves) -> str:
    """16 hexadecimal digits of codes, places and labels."""
    digest = hashlib.sha256(waves.codes.numpy())
    digest.update(waves.offsets.numpy())
    if waves.labels is not None:
        digest.update(waves.labels.contiguous().numpy())
    return digest.hexdigest()[:16]
