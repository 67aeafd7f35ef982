"""A set of sounds, and the log-mel spectrograms of their clips, in mapped files."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from genai_fast.data import cache as store
from genai_fast.data.audio.mel import Spectrum, mel_power, to_features
from genai_fast.data.audio.sound import as_floats
from genai_fast.data.errors import DataError, DataWarning
from genai_fast.data.images import Images, array_digest, permutation

_VERSION = 1  # of how samples become features
_AT_ONCE = 256  # clips transformed at a time


@dataclass(frozen=True)
class Sounds:
    """Sounds of one rate, mono.

    samples: [T] int16, one sound after the other; may be a mapped file.
    offsets: [N + 1] int64: sound k is samples[offsets[k] : offsets[k + 1]].
    rate: samples per second.
    labels: [N] int64, or None. classes: the name of each label.
    skipped: the names of files that were left out because they are broken.
    names: of the files that the sounds are from, in order, as paths below their folder.
    content: array_digest of `samples` if it is known.
    """

    name: str
    samples: np.ndarray
    offsets: np.ndarray
    rate: int
    labels: torch.Tensor | None = None
    classes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    content: str = ""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def seconds(self) -> float:
        """Of all sounds together."""
        return len(self.samples) / self.rate

    def sound(self, k: int) -> torch.Tensor:
        """Sound k, [n] float32 in [-1, 1]."""
        return as_floats(self.samples[self.offsets[k] : self.offsets[k + 1]])


@dataclass(frozen=True)
class Clips(Images):
    """Log-mel spectrograms of clips of one length, as images without channels: stored [M, mels, frames] in [0, 1].

    origin: [N] int64, the sound that each of the set's clips is of.
    """

    origin: torch.Tensor | None = None

    def subset(self, index: torch.Tensor) -> Clips:
        """The clips of these numbers, in this order; shares `stored`."""
        return replace(super().subset(index), origin=self.origin[index])

    def split(self, fraction: float, seed: int) -> tuple[Clips, Clips]:
        """(training, validation): a random `fraction` of the sounds with all their clips, fixed by the seed, is held
        out; of a single sound its end.

        Raises DataError: there are too few.
        """
        sounds = self.origin.unique()
        count = len(sounds) if len(sounds) > 1 else len(self)
        held_out = round(fraction * count)
        if not 0 < held_out < count:
            what = "sounds" if len(sounds) > 1 else "clips in the only sound"
            raise DataError(
                f"{self.name}: expected enough {what} to hold out {fraction:g} of them, got {count}; remedy: more, or"
                f" another share (--validation)"
            )
        if len(sounds) == 1:
            return self.subset(torch.arange(count - held_out)), self.subset(torch.arange(count - held_out, count))
        place = torch.empty(count, dtype=torch.int64)
        place[permutation(count, seed)] = torch.arange(count)
        of_clip = place[torch.searchsorted(sounds, self.origin)]
        order, border = of_clip.argsort(stable=True), int((of_clip < held_out).sum())
        return self.subset(order[border:]), self.subset(order[:border])


def clips_of(sounds: Sounds, spectrum: Spectrum, frames: int, cache: bool | str | Path | None = None) -> Clips:
    """The features (`mel.to_features`) of sounds cut into clips of `frames` frames, moved to [0, 1].

    A clip has (frames - 1) hop samples. Of a sound that is no whole number of clips, the rest is a clip with silence
    after it if it is at least half of one or if there is no other, and is left out otherwise.

    Args:
        cache: a folder for the features; None or True: `sounds` in $GENAI_FAST_CACHE, else in the user's cache folder;
            False: compute into memory.

    Raises DataError: there are fewer than 2 frames, or the sounds have another rate than the spectrum.
    """
    if frames < 2 or sounds.rate != spectrum.rate:
        raise DataError(
            f"clips of {sounds.name}: expected at least 2 frames and sounds of {spectrum.rate} samples per second, got"
            f" {frames} and {sounds.rate}"
        )
    length = (frames - 1) * spectrum.hop
    counts = np.maximum((np.diff(sounds.offsets) + length // 2) // length, 1)
    origin = torch.from_numpy(np.repeat(np.arange(len(sounds)), counts))
    entry, features, content = None, None, ""
    if cache is not False:
        parent = store.folder("sounds") if cache in (None, True) else Path(cache)
        state = [_VERSION, sounds.content or array_digest(sounds.samples), array_digest(sounds.offsets)]
        entry = store.Entry.of(parent, ["clips", sounds.name, spectrum, frames], state)
        found = _kept(entry, (len(origin), spectrum.mels, frames)) or _written(entry, sounds, spectrum, frames, origin)
        features, content = found or (None, "")
    if features is None:
        features = np.empty((len(origin), spectrum.mels, frames), np.float32)
        _fill(features, sounds, spectrum, frames, counts)
    labels = None if sounds.labels is None else sounds.labels[origin]
    about = {"labels": labels, "classes": sounds.classes, "skipped": sounds.skipped, "content": content}
    return Clips(sounds.name, torch.from_numpy(features), **about, origin=origin)


def _kept(entry: store.Entry, shape: tuple[int, ...]) -> tuple[np.ndarray, str] | None:
    found = entry.read()
    features = None if found is None else found.arrays.get("features")
    if features is None or features.dtype != np.float32 or features.shape != shape:
        return None
    return features, found.digests["features"]


def _written(
    entry: store.Entry, sounds: Sounds, spectrum: Spectrum, frames: int, origin: torch.Tensor
) -> tuple[np.ndarray, str] | None:
    shape = (len(origin), spectrum.mels, frames)
    try:
        with entry.writer() as hidden:
            features = store.new_array(hidden, "features", shape, np.float32)
            _fill(features, sounds, spectrum, frames, origin.bincount(minlength=len(sounds)).numpy())
            features.flush()
            entry.finish(hidden, {})
        return _kept(entry, shape)
    except OSError as error:
        message = f"{entry.path}: cannot be written: {error.strerror or error}; spectrograms are computed to memory"
        warnings.warn(message, DataWarning, stacklevel=3)
        return None


def _fill(features: np.ndarray, sounds: Sounds, spectrum: Spectrum, frames: int, counts: np.ndarray) -> None:
    clips = _clips(sounds, (frames - 1) * spectrum.hop, counts)
    for first in range(0, len(features), _AT_ONCE):
        power = mel_power(torch.stack(list(itertools.islice(clips, _AT_ONCE))), spectrum)
        features[first : first + _AT_ONCE] = (to_features(power, spectrum.scale) * 0.5 + 0.5).numpy()


def _clips(sounds: Sounds, length: int, counts: np.ndarray) -> Iterator[torch.Tensor]:
    for k, count in enumerate(counts.tolist()):
        x = sounds.sound(k)[: count * length]
        yield from torch.nn.functional.pad(x, (0, count * length - len(x))).view(count, length)
