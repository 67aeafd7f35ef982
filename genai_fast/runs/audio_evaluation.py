"""What is looked at and listened to while a model of sounds trains: pictures of spectrograms, WAV files, figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.config import AudioConfig
from genai_fast.contract import image_traits
from genai_fast.data.audio import Clips, Spectrum, mel_error, to_sound, write_wav
from genai_fast.evaluation import warnings_of
from genai_fast.models.common import latents
from genai_fast.runs import pictures
from genai_fast.runs.image_evaluation import generate, latent_plane
from genai_fast.training import distributed
from genai_fast.training.batches import SoundFeed
from genai_fast.training.loop import Look, evaluate
from genai_fast.training.tensorboard import Board

_SAMPLES = 16  # in a grid
_SHOWN = 8  # sounds that are shown with their reconstructions
_MOST = 1000  # clips that figures compare
_AT_ONCE = 100  # clips reconstructed at a time
_GAP = 0.2  # seconds of silence between the sounds of a file


@torch.no_grad()
def reconstructed(model: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """What a model makes of features [N, mels, frames] in [-1, 1], on the CPU, some at a time."""
    device = next(model.parameters()).device
    with latents.evaluating(model):
        parts = [model.reconstruct(x.to(device)).float().cpu() for x in features.split(_AT_ONCE)]
    return torch.cat(parts)


def write(features: torch.Tensor, spectrum: Spectrum, path: Path, columns: int | None = None) -> torch.Tensor:
    """Write features [N, mels, frames] in [-1, 1] as a WAV file, one after the other, and as a picture beside it.

    Returns: the picture's pixels [3, H, W], uint8.
    """
    sounds = torch.cat([to_sound(x, spectrum) for x in features.split(_AT_ONCE)])
    write_wav(path.with_suffix(".wav"), F.pad(sounds, (0, round(_GAP * spectrum.rate))).flatten(), spectrum.rate)
    return pictures.spectrograms(features * 0.5 + 0.5, path.with_suffix(".png"), columns)


def in_turn(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Several [N, ...] -> [len(rows) N, ...]: the first of each, then the second of each, ..."""
    return torch.stack(list(rows), 1).flatten(0, 1)


def pairs(model: nn.Module, features: torch.Tensor, spectrum: Spectrum, path: Path) -> torch.Tensor:
    """Sounds and what the model makes of them, in turn: four pairs in a row of the picture. Returns: as `write`."""
    return write(in_turn([features, reconstructed(model, features)]), spectrum, path, columns=min(8, 2 * len(features)))


def drawn(model: nn.Module, shape: tuple[int, ...], count: int, seed: int) -> torch.Tensor:
    """Samples [count, mels, frames] in [-1, 1], on the CPU."""
    return generate(model, shape, count, seed) * 2 - 1


def draw(model: nn.Module, train: Clips, validation: Clips, spectrum: Spectrum, folder: Path) -> None:
    """samples, and reconstructions of held-out sounds, each .wav and .png; latent.png if z has two dimensions."""
    write(drawn(model, train.shape, _SAMPLES, seed=1), spectrum, folder / "samples.wav")
    pairs(model, validation.batch(slice(0, _SHOWN), signed=True), spectrum, folder / "reconstructions.wav")
    latent_plane(model, train, folder / "latent.png")


class AudioWatch:
    """Called at the end of an epoch: writes grids/epoch-<n>.png and .wav, to a board the picture; gives figures on
    held-out sounds."""

    def __init__(
        self, model: nn.Module, train: Clips, validation: Clips, config: AudioConfig, spectrum: Spectrum, folder: Path,
        board: Board | None = None,
    ) -> None:  # fmt: skip
        self._model, self._train, self._validation = model, train, validation
        self._config, self._spectrum, self._folder, self._board = config, spectrum, folder, board
        self._error_of_mean: float | None = None

    def __call__(self, epoch: int, train: dict[str, float]) -> Look:
        """Figures and warnings of epoch `epoch`, whose mean losses in training were `train`."""
        every = self._config.grid_every
        if distributed.first() and every and epoch % every == 0:
            path = self._folder / "grids" / f"epoch-{epoch:04d}.wav"
            path.parent.mkdir(exist_ok=True)
            sheet = write(drawn(self._model, self._train.shape, _SAMPLES, seed=1), self._spectrum, path)
            if self._board is not None:
                self._board.picture("samples", sheet)
        feed = SoundFeed(self._model, self._validation, self._config)
        figures = evaluate(self._model, feed, self._config)
        figures["negative_elbo"] = figures["reconstruction"] + figures["kl"]
        if distributed.first():
            figures |= self._errors()
        latent = image_traits(self._model).latent
        return Look(figures, warnings_of(figures, latent=latent, kl=figures["kl"]))

    def _errors(self) -> dict[str, float]:
        x, scale = self._validation.batch(slice(0, _MOST), signed=True), self._spectrum.scale
        if self._error_of_mean is None:
            mean = self._train.batch(slice(0, _MOST), signed=True).mean(0).expand_as(x)
            self._error_of_mean = float(mel_error(mean, x, scale))
        error = float(mel_error(reconstructed(self._model, x), x, scale))
        return {"mel_error": error, "mel_error_mean": self._error_of_mean}
