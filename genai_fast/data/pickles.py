"""Pickles as data: no code runs, and what a short one can make stays small."""

from __future__ import annotations

import io
import pickle
from typing import Any, ClassVar


class DataUnpickler(pickle._Unpickler):  # Python's own: C's lets a file choose how much memory its memo takes
    """Reads a pickle's containers, strings and numbers; subclasses say in `find_class` what globals stand for.

    Tuples become lists: a tuple that holds itself k times, a few times over, takes for ever to hash as a key of a dict.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, raw: bytes, **options: Any) -> None:
        super().__init__(io.BytesIO(raw), **options)
        self._total = len(raw)

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a pickle that asks for {module}.{name}; nothing in it was executed")

    def _marked(self) -> None:
        items = self.pop_mark()  # which changes self.append
        self.append(items)

    def _last(self, count: int) -> None:
        items = self.stack[len(self.stack) - count :]
        if len(items) < count:
            raise pickle.UnpicklingError("unexpected MARK found")
        self.stack[len(self.stack) - count :] = [items]

    def _bytearray(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        if size > self._total:
            raise pickle.UnpicklingError("pickle data was truncated")
        self.append(bytearray(self.read(size)))

    dispatch[pickle.TUPLE[0]] = _marked
    dispatch[pickle.EMPTY_TUPLE[0]] = lambda self: self.append([])
    dispatch[pickle.TUPLE1[0]] = lambda self: self._last(1)
    dispatch[pickle.TUPLE2[0]] = lambda self: self._last(2)
    dispatch[pickle.TUPLE3[0]] = lambda self: self._last(3)
    dispatch[pickle.BYTEARRAY8[0]] = _bytearray
