"""Pickles as data: no code runs, and what a short one can make stays small."""

import io
import pickle
from collections.abc import Iterable
from typing import Any, BinaryIO, ClassVar

_MOST = 1 << 20  # items of a tuple and of the tuples in it


class _Tuple(tuple):
    """A tuple that knows how many items are in it at all depths: to hash it visits each."""

    size = 1


def _tuple(items: Iterable[Any]) -> _Tuple:
    found = _Tuple(items)
    found.size = 1 + sum(item.size if isinstance(item, _Tuple) else 1 for item in found)
    if found.size > _MOST:
        raise pickle.UnpicklingError("tuples in tuples of too many items")
    return found


class DataUnpickler(pickle._Unpickler):  # Python's own: C's lets a file choose how much memory its memo takes
    """Reads a pickle's containers, strings and numbers; subclasses say in `find_class` what globals stand for."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, source: bytes | BinaryIO, **options: Any) -> None:
        super().__init__(io.BytesIO(source) if isinstance(source, bytes) else source, **options)

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a pickle that asks for {module}.{name}; nothing in it was executed")

    def _marked(self) -> None:
        items = self.pop_mark()  # which changes self.append
        self.append(_tuple(items))

    def _last(self, count: int) -> None:
        if len(self.stack) < count:
            raise pickle.UnpicklingError("unexpected MARK found")
        self.stack[len(self.stack) - count :] = [_tuple(self.stack[len(self.stack) - count :])]

    def _bytearray(self) -> None:  # Python's reserves the memory before it reads
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.TUPLE[0]] = _marked
    dispatch[pickle.TUPLE1[0]] = lambda self: self._last(1)
    dispatch[pickle.TUPLE2[0]] = lambda self: self._last(2)
    dispatch[pickle.TUPLE3[0]] = lambda self: self._last(3)
    dispatch[pickle.BYTEARRAY8[0]] = _bytearray
