"""One sound file: its samples, mono, at a rate, trimmed and normalised."""

from __future__ import annotations

import math
import wave
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from genai_fast import atomic_files
from genai_fast.data.reading import open_regular, parsing
from genai_fast.errors import missing, require

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus")
_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG")  # libsndfile goes by content, and knows many more
_SLOWEST, _FASTEST = 1000, 1_000_000  # samples per second
# Samples of a file, and more only if its bytes are at least a hundredth of them: Opus at 8 kbit/s has 50 a byte.
_SAMPLES, _RATIO = 1 << 24, 100
_BLOCK = 1 << 18  # samples read at a time
_FULL = 32767  # of 16 bits
_SILENT = 1e-6  # of full scale: nothing is louder, 120 dB below it
_WINDOW, _HOP = 2048, 512  # of the level that silence is found by


class Treatment(NamedTuple):
    """What is done to a file. rate: samples per second. trim: decibels below the loudest part; 0: nothing is cut."""

    rate: int
    trim: float = 0.0


def check_packages() -> None:
    """Raises UsageError: soundfile, with the library that it brings, or soxr does not import."""
    for package in ("soundfile", "soxr"):
        try:
            require(package, "audio")
        except OSError as error:  # a system for which soundfile has no libsndfile
            raise missing(package, "audio", str(error)) from error


def read_samples(file: BinaryIO, how: Treatment) -> np.ndarray:
    """The sound in a WAV, FLAC or OGG file, [T] int16, whose loudest sample is full scale.

    Channels are averaged; another rate is resampled by soxr in its high quality; with `trim` both ends are cut off as
    far as their level (root mean square of 2,048 samples) is that many decibels below the loudest.

    Raises Exception: it is no such file, is silent, or is far longer than its bytes; libsndfile raises its own.
    """
    soundfile, soxr = require("soundfile", "audio"), require("soxr", "audio")
    packed = file.seek(0, 2)
    file.seek(0)
    with soundfile.SoundFile(file) as sound:
        if sound.format not in _FORMATS:
            raise ValueError(f"a file of format {sound.format}; remedy: convert it to WAV, FLAC or OGG")
        rate, frames = sound.samplerate, sound.frames
        if not _SLOWEST <= rate <= _FASTEST:
            raise ValueError(f"{rate} samples per second; expected {_SLOWEST:,} to {_FASTEST:,}")
        if frames * max(sound.channels, how.rate / rate) > max(_SAMPLES, _RATIO * packed):
            raise ValueError(f"{frames} samples of {sound.channels} channels in {packed} bytes; remedy: split it")
        resampler = None if rate == how.rate else soxr.ResampleStream(rate, how.rate, 1, dtype="float32")
        parts, read = [np.empty(0, np.float32)], 0
        while read < frames and len(block := sound.read(max(_BLOCK // sound.channels, 1), "float32", always_2d=True)):
            read += len(block)
            mono = block.mean(1)
            parts.append(mono if resampler is None else resampler.resample_chunk(mono))
        if resampler is not None:
            parts.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    if read != frames:
        raise ValueError(f"{read} samples where the header says {frames}")
    return _normalised(np.concatenate(parts), how.trim)


def _normalised(x: np.ndarray, trim: float) -> np.ndarray:
    peak = max(float(x.max(initial=0.0)), -float(x.min(initial=0.0)))
    if not math.isfinite(peak):  # of NaN too
        raise ValueError("samples that are not finite")
    if peak < _SILENT:
        raise ValueError("silence")
    start, end = loud_part(x, trim) if trim else (0, len(x))
    scaled = x[start:end] * np.float32(_FULL / peak)
    return np.rint(scaled, out=scaled).astype(np.int16)


def loud_part(x: np.ndarray, trim: float) -> tuple[int, int]:
    """(start, end) of what is left of x [T] when both ends are cut off as far as they are `trim` decibels below the
    loudest: as `librosa.effects.trim`."""
    hops = np.pad(x, (0, -len(x) % _HOP)).reshape(-1, _HOP)
    power = np.pad(np.einsum("ij,ij->i", hops, hops, dtype=np.float64), (_WINDOW // _HOP // 2, _WINDOW // _HOP))
    frames = 1 + len(x) // _HOP
    level = sum(power[k : k + frames] for k in range(_WINDOW // _HOP))  # of a window around each multiple of the hop
    loud = np.flatnonzero(level > level.max() * 10 ** (-trim / 10))
    return int(loud[0]) * _HOP, min(len(x), (int(loud[-1]) + 1) * _HOP)


def read_sound(path: str | Path, how: Treatment) -> torch.Tensor:
    """A sound file as [T] float32 in [-1, 1]; see `read_samples`. Raises DataError: it cannot be read."""
    check_packages()
    with parsing(path, "a sound in WAV, FLAC or OGG", "another file"), open_regular(path) as file:
        return as_floats(read_samples(file, how))


def as_floats(samples: np.ndarray) -> torch.Tensor:
    """int16 -> float32 in [-1, 1]."""
    return torch.from_numpy(samples.astype(np.float32)) / _FULL


def write_wav(path: Path, x: torch.Tensor, rate: int) -> None:
    """Write samples [T], clipped to [-1, 1], as a WAV file of 16 bits, whole or not at all."""
    samples = (x.detach().float().cpu().nan_to_num(0.0).clamp(-1, 1) * _FULL).round().to(torch.int16)
    with atomic_files.whole(path) as hidden, wave.open(str(hidden), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.numpy().astype("<i2").tobytes())
