"""The tensors that a launch may access, as the engine sees them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from genai_fast.emulator.engine import RANGE


class Memory:
    """Their views, then the storages that these lie in."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors, self._names = list(tensors.values()), list(tensors)
        views = [(*_extent(t), k, 1) for k, t in enumerate(self._tensors) if t.numel()]
        storages = [(*_storage(t), k, 0) for k, t in enumerate(self._tensors) if t.untyped_storage().nbytes()]
        self.ranges = np.zeros(len(views) + len(storages), RANGE)
        self._sectors: list[tuple[np.ndarray, np.ndarray]] = []
        for k, (begin, end, number, strict) in enumerate([*views, *storages]):
            words = (end - (begin & ~31)) // 32 // 64 + 2
            sets, last = np.zeros((2, words), np.uint64), np.zeros(64 * words, np.uint32)
            self._sectors.append((sets, last))
            self.ranges[k] = (begin, end, number, strict, sets[0].ctypes.data, sets[1].ctypes.data, last.ctypes.data)

    def footprint(self) -> tuple[int, int]:
        """Distinct bytes read and written, in whole sectors."""
        read, written = (sum(int(np.bitwise_count(sets[k]).sum()) for sets, _ in self._sectors) * 32 for k in (0, 1))
        return read, written

    def describe(self, number: int) -> str:
        """A tensor for messages: x_ptr (float32 [4, 5])."""
        t = self._tensors[number]
        return f"{self._names[number]} ({str(t.dtype).removeprefix('torch.')} {list(t.shape)})"

    def named(self, address: int) -> str:
        """What lies at an address, or "" for shared memory."""
        for begin, end, number, *_ in self.ranges.tolist():
            if begin <= address < end:
                return f"{self.describe(number)} at byte {address - begin}"
        return ""


def _extent(t: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _storage(t: torch.Tensor) -> tuple[int, int]:
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
