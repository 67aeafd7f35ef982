"""Training on sounds: the data, the model that fits them, what is looked at and listened to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.config import AudioConfig
from genai_fast.data import audio
from genai_fast.data.audio import Spectrum
from genai_fast.errors import UsageError
from genai_fast.models.registry import make
from genai_fast.runs.audio_evaluation import AudioWatch, draw
from genai_fast.runs.image_task import ImageTask, digest_of
from genai_fast.training.batches import Feed, SoundFeed
from genai_fast.training.loop import Look
from genai_fast.training.tensorboard import Board


def spectrum_of(settings: AudioConfig) -> Spectrum:
    return Spectrum(settings.rate, settings.mels, settings.n_fft, settings.hop, settings.scale)


def clips_for(settings: AudioConfig, source: str) -> audio.Clips:
    """The clips of some sounds as a run with these settings takes them."""
    how = audio.treatment(settings.data, settings.rate, settings.trim)
    sounds = audio.load(source, how.rate, trim=how.trim, strict=settings.strict)
    return audio.clips_of(sounds, spectrum_of(settings), settings.frames)


def first_clip(path: Path, settings: AudioConfig) -> torch.Tensor:
    """The beginning of a sound file, [mels, frames] in [-1, 1]; of a short one with silence after it.

    Raises DataError: it cannot be read.
    """
    length, spectrum = (settings.frames - 1) * settings.hop, spectrum_of(settings)
    x = audio.read_sound(path, audio.treatment(settings.data, settings.rate, settings.trim))[:length]
    return audio.to_features(audio.mel_power(F.pad(x, (0, length - len(x))), spectrum), spectrum.scale)


class AudioTask(ImageTask):
    """A recipe for sounds and its data: log-mel spectrograms of clips."""

    def __init__(self, name: str, settings: AudioConfig, resumed: Path | None = None) -> None:
        clips = clips_for(settings, settings.data)
        self.name, self.settings, self.images = name, settings, clips
        self.train, self.validation = clips.split(settings.validation, settings.seed)
        self.about: dict[str, Any] = {"recipe": name, "shape": list(clips.shape), "clips": len(clips)}
        self.about |= {"classes": [], "data": digest_of(clips)}

    @property
    def described(self) -> str:
        """The data in words."""
        return f"{self.images.name}: {len(self.train):,} clips for training, {len(self.validation):,} held out"

    def feeds(self, model: nn.Module) -> tuple[Feed, Feed]:
        """For training and for validation."""
        return SoundFeed(model, self.train, self.settings), SoundFeed(model, self.validation, self.settings)

    def watch(self, model: nn.Module, folder: Path, board: Board | None) -> Callable[[int, dict[str, float]], Look]:
        return AudioWatch(model, self.train, self.validation, self.settings, spectrum_of(self.settings), folder, board)

    def finish(self, model: nn.Module, folder: Path) -> None:
        draw(model, self.train, self.validation, spectrum_of(self.settings), folder)

    @staticmethod
    def open(name: str, settings: AudioConfig, about: dict[str, Any], folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        """A run's model, without its weights, and what else `Opened` says of it."""
        shape = (settings.mels, settings.frames)
        if tuple(about["shape"]) != shape:
            raise UsageError(f"{folder}: expected spectrograms of {shape} in its checkpoint, got {about['shape']}")
        return make(name, settings, shape, 0), {"shape": shape}
