"""Settings that with-blocks change, safely in threads."""

import contextlib
import contextvars
import threading
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Block(Generic[T]):
    """One change of a setting; `open` once a with-statement is to undo it."""

    def __init__(self, value: T, token: contextvars.Token[T]) -> None:
        self.value, self.token, self.open, self.thread = value, token, False, threading.get_ident()


class Scoped(Generic[T]):
    """A setting: a thread reads what it has set itself, whatever others do in the meantime.

    A thread that has set nothing reads what was set last in the process: autograd's threads, which compute checkpoints
    again, have a context of their own. So does torch.compile, which cannot read a ContextVar but guards an attribute.
    """

    def __init__(self, name: str, default: T) -> None:
        self._own: contextvars.ContextVar[T] = contextvars.ContextVar(name)
        self._blocks: list[Block[T]] = []
        self._lock = threading.Lock()
        self._default = self.latest = default

    def get(self) -> T:
        if not self._blocks or torch.compiler.is_compiling():
            return self.latest
        return self._own.get(self.latest)

    def enter(self, value: T) -> Block[T]:
        with self._lock:
            block, superseded = Block(value, self._own.set(value)), False
            for old in reversed([b for b in self._blocks if b.thread == block.thread]):
                if old.open:
                    break
                if superseded:  # a later value, set for good as this one was, is the one to return to
                    self._blocks.remove(old)
                superseded = True
            self._blocks.append(block)
            self.latest = value
        return block

    def leave(self, block: Block[T]) -> None:
        """As it was before the block, in this thread and for those that read the latest."""
        with contextlib.suppress(ValueError):  # entered in another context (a generator's): that one has ended
            self._own.reset(block.token)
        with self._lock:
            if block in self._blocks:
                start = self._blocks.index(block)
                inside = [b for b in self._blocks[start:] if b.thread != block.thread]
                self._blocks[start:] = inside
            self.latest = self._blocks[-1].value if self._blocks else self._default
