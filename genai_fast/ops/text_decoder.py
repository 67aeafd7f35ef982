"""What decoders of whole Transformers share: their cache's length, weights that may change, and checks of ids."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from genai_fast.kernels.common.narrow import span
from genai_fast.ops import checks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class TextDecoder:
    """A cache of `length` tokens for each of `batch` samples, `block` at most, and the weights that it was made by.

    A subclass has `_cache` and `_sources`, the tensors whose changes can be seen, before it calls `refresh`.
    """

    length: int
    block: int
    batch: int
    vocabulary: int
    _cache: torch.Tensor
    _sources: list[torch.Tensor]

    def _narrowed(self) -> None:
        """Read the weights."""
        raise NotImplementedError

    def _logits(self, ids: torch.Tensor, every: bool) -> torch.Tensor:
        """Append ids [B, T], which have been checked -> logits [B, V] behind the last, or [B, T, V] behind each."""
        raise NotImplementedError

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Start again with the tokens ids, int64 [B, T]; gives the logits float32 [B, V] behind the last."""
        self._check(ids, 0)
        self.reset()
        return self.append(ids)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Append one token per sample, int64 [B]; gives logits float32 [B, V]."""
        if not isinstance(ids, torch.Tensor) or ids.dim() != 1:
            got = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ValueError(
                f"{type(self).__name__}: ids: expected int64 [{self.batch}], one token a sample, got {got}"
            )
        return self.append(ids.unsqueeze(1))

    def append(self, ids: torch.Tensor) -> torch.Tensor:
        """Append the tokens ids, int64 [B, T]; gives the logits float32 [B, V] behind the last."""
        return self._append(ids, False)

    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """Append the tokens ids, int64 [B, T]; gives the logits float32 [B, T, V] behind each."""
        return self._append(ids, True)

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        if not 0 <= length <= self.length:
            raise ValueError(f"{type(self).__name__}: length: expected 0 to {self.length}, got {length}")
        self.length = length

    def _append(self, ids: torch.Tensor, every: bool) -> torch.Tensor:
        self._check(ids, self.length)
        if self._changed():
            if self.length:
                raise RuntimeError(
                    f"{type(self).__name__}: expected the weights that made the {self.length} tokens of the cache, got"
                    f" changed ones; start again with reset() or prefill()"
                )
            self.refresh()
        with torch.no_grad():
            logits = self._logits(ids, every)
        self.length += ids.size(1)
        return logits

    def reset(self) -> None:
        """Forget all tokens. Weights that have changed are read again before the next."""
        self.length = 0

    def refresh(self) -> None:
        """Read the weights again, and forget all tokens."""
        self._narrowed()
        self._read = self._versions()
        self.length = 0

    def _check(self, ids: Any, length: int) -> None:
        check_ids(type(self).__name__, ids, self.vocabulary, self._cache.device)
        if ids.size(0) != self.batch:
            raise ValueError(f"{type(self).__name__}: ids: expected a batch of {self.batch}, got {ids.size(0)}")
        check_room(type(self).__name__, length, ids.size(1), self.block)

    def _versions(self) -> int:
        """Grows with every change in place that PyTorch knows of. (Tensors of inference mode count none.)"""
        return sum(w._version for w in self._sources)

    def _changed(self) -> bool:
        return self._versions() != self._read


def in_order(
    owner: str,
    weights: Mapping[str, torch.Tensor],
    names: Sequence[str],
    absent: Callable[[str, torch.Tensor], torch.Tensor | None],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The weights of these names, and those of them whose changes can be seen.

    The last may be tied to the first, by its memory or by being absent.

    Args:
        absent: name and the tensor before it -> what stands for one that is absent; None: it is needed.
    """
    found: list[torch.Tensor] = []
    for name in names:
        w = weights.get(name)
        if w is None and found:
            w = found[0] if name == names[-1] else absent(name, found[-1])
        if w is None:
            raise ValueError(f"{owner}: weights: expected a tensor {name!r}, got {len(weights)} of other names")
        checks.is_floating(owner, name, w)
        if not w.is_cpu:
            raise ValueError(f"{owner}: {name}: expected a CPU tensor, got one on {w.device}; move it with .cpu()")
        tied = name == names[-1] and w.shape == found[0].shape and w.data_ptr() == found[0].data_ptr()
        found.append(found[0] if tied else w.detach())
    return found, [w for w in found if not w.is_inference()]


def positive_sizes(owner: str, **values: Any) -> list[int]:
    for name, value in values.items():
        if not isinstance(checks.number(value), int) or value < 1:
            raise ValueError(f"{owner}: {name}: expected an int of at least 1, got {value!r}")
    return [int(value) for value in values.values()]


def check_ids(op: str, ids: Any, vocabulary: int, device: torch.device) -> None:
    if not isinstance(ids, torch.Tensor) or ids.dtype is not torch.int64:
        got = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"{op}: ids: expected an int64 tensor, got {got}")
    if ids.dim() != 2 or ids.size(1) < 1:
        raise ValueError(f"{op}: ids: expected [B, T] with at least 1 token, got shape {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"{op}: ids: expected device {device} as the cache has, got {ids.device}")
    if not torch.compiler.is_compiling() and ids.numel():
        least, most = span(ids)
        if least < 0 or most >= vocabulary:
            raise ValueError(
                f"{op}: ids: expected 0 to {vocabulary - 1}, got {least if least < 0 else most}; the tokenizer must be"
                f" the model's"
            )


def check_room(op: str, length: int, tokens: int, room: int) -> None:
    if length + tokens > room:
        remedy = "reset it, or make one with a larger block" if op.endswith("Decoder") else "make a larger cache"
        raise ValueError(
            f"{op}: ids: expected at most {max(room - length, 0)} new tokens, as the cache holds {length} of {room},"
            f" got {tokens}; {remedy}"
        )
