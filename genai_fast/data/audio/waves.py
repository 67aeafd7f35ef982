"""Sounds as they are: mu-law codes, in windows that a model predicts sample by sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from genai_fast.data.audio.mu_law import mu_law_encode
from genai_fast.data.audio.sounds import Sounds
from genai_fast.data.errors import DataError
from genai_fast.data.images import epoch_order, permutation
from genai_fast.data.text.feeds import IGNORED, Batch, Feed

LEVELS = 256
SILENCE = LEVELS // 2  # the code of 0


@dataclass(frozen=True)
class Waves:
    """Windows of sounds, none longer than `block` samples.

    codes: [T] uint8, one sound after the other. origin, start, stop: [N] int64, of each window its sound and its place
    in `codes`. offsets: [sounds + 1] int64, where each sound begins. labels: [sounds] int64, or None.
    """

    name: str
    codes: torch.Tensor
    offsets: torch.Tensor
    origin: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    block: int
    labels: torch.Tensor | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.origin)

    @property
    def samples(self) -> int:
        """Of all windows together."""
        return int((self.stop - self.start).sum())

    def subset(self, index: torch.Tensor) -> Waves:
        """The windows of these numbers, in this order; shares `codes`."""
        return replace(self, origin=self.origin[index], start=self.start[index], stop=self.stop[index])

    def split(self, fraction: float, seed: int) -> tuple[Waves, Waves]:
        """(training, validation): a random `fraction` of the sounds with all their windows, fixed by the seed, is held
        out; of a single sound its end.

        Raises DataError: there are too few.
        """
        sounds = self.origin.unique()
        alone = len(sounds) < 2
        count = len(self) if alone else len(sounds)
        held_out = round(fraction * count)
        if not 0 < held_out < count:
            what = "windows in the only sound" if alone else "sounds"
            raise DataError(
                f"{self.name}: expected enough {what} to hold out {fraction:g} of them, got {count}; remedy: more, or"
                f" another share (--validation)"
            )
        if alone:
            held = torch.arange(count) >= count - held_out
        else:
            held = torch.isin(self.origin, sounds[permutation(count, seed)[:held_out]])
        return self.subset(torch.nonzero(~held).squeeze(1)), self.subset(torch.nonzero(held).squeeze(1))


def waves_of(sounds: Sounds, block: int) -> Waves:
    """Sounds cut into windows of `block` samples; the last of each may be shorter.

    Raises DataError: `block` is less than 1.
    """
    if block < 1:
        raise DataError(f"block: expected at least 1 sample, got {block}")
    codes = np.empty(len(sounds.samples), np.uint8)
    for k in range(len(sounds)):  # one at a time: floats take twelve times the memory
        codes[sounds.offsets[k] : sounds.offsets[k + 1]] = mu_law_encode(sounds.sound(k), LEVELS).numpy()
    offsets = torch.from_numpy(sounds.offsets.astype(np.int64))
    windows = [torch.arange(a, b, block) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    origin = torch.repeat_interleave(torch.arange(len(windows)), torch.tensor([len(w) for w in windows]))
    start = torch.cat(windows)
    stop = torch.minimum(start + block, offsets[origin + 1])
    return Waves(
        sounds.name, torch.from_numpy(codes), offsets, origin, start, stop, block, sounds.labels, sounds.classes
    )


class WaveFeed(Feed):
    """(codes [B, T], targets [B, T][, labels [B]]), int64: a target is the code after the one in its place.

    Before a sound's first sample is silence. What is beyond a window's end is silence too, with targets of -100. An
    epoch takes the windows in random order, the few that fill no batch are others in each.

    Args:
        waves: the windows.
        size: B.
        seed: decides the orders.
        lead: codes before each window that all() gives too, with targets of -100: what the model looks back to.
        labels: whether each batch has them.
    """

    names: ClassVar[tuple[str, ...]] = ("codes", "targets", "labels")

    def __init__(self, waves: Waves, size: int, seed: int = 0, lead: int = 0, labels: bool = False) -> None:
        self.size, self._waves, self._seed, self._lead, self._labels = size, waves, seed, lead, labels

    @property
    def steps(self) -> int:
        steps = len(self._waves) // self.size
        if steps < 1:
            raise DataError(
                f"{self._waves.name}: expected at least {self.size} windows of {self._waves.block} samples for"
                f" training, a batch, got {len(self._waves)}; remedy: more sounds, or a smaller --batch-size or --block"
            )
        return steps

    def _epoch(self, epoch: int, start: int, steps: int) -> Iterator[Batch]:
        order = epoch_order(len(self._waves), self._seed, epoch)
        for number in range(start, steps):
            yield self._gather(order[number * self.size : (number + 1) * self.size], 0)

    def all(self) -> Iterator[Batch]:
        for index in torch.arange(len(self._waves)).split(self.size):
            yield self._gather(index, self._lead)

    def _gather(self, index: torch.Tensor, lead: int) -> Batch:
        waves = self._waves
        shape = (len(index), waves.block + lead)
        codes, targets = torch.full(shape, SILENCE), torch.full(shape, IGNORED)
        for row, k in enumerate(index.tolist()):
            start, stop, begin = int(waves.start[k]), int(waves.stop[k]), int(waves.offsets[waves.origin[k]])
            first = max(start - lead, begin)
            length = stop - first
            inputs = waves.codes[first - 1 : stop - 1] if first > begin else waves.codes[first : stop - 1]
            codes[row, length - len(inputs) : length] = inputs.long()
            targets[row, start - first : length] = waves.codes[start:stop].long()
        return (codes, targets, waves.labels[waves.origin[index]]) if self._labels else (codes, targets)
