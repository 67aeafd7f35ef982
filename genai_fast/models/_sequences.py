"""What models of sequences share: losses, checks, padding, and decoding step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from genai_fast.models import _check
from genai_fast.ops._function import observed

IGNORED = -100  # a target that does not count, as for F.cross_entropy

Choose = Callable[[torch.Tensor], int]
"""logits [V] -> the id of the next token, as `models.generation.Sampler` is called. None stands for the likeliest."""


class SequenceLosses(NamedTuple):
    """0-d float32 tensors, each a mean over the batch's sequences, in nats: loss = reconstruction + beta kl."""

    loss: torch.Tensor
    reconstruction: torch.Tensor
    kl: torch.Tensor
    tokens: torch.Tensor  # tokens a sequence: reconstruction + kl over tokens bounds the nats a token


class Decoder(Protocol):
    """A state of sequences that are being written."""

    def step(self, ids: torch.Tensor | None) -> torch.Tensor:
        """The tokens [B] (int64) that come next in each sequence -> logits [B, V] of the tokens after them."""


def check_ids(
    owner: str, name: str, ids: torch.Tensor, vocabulary: int, lengths: torch.Tensor | None = None
) -> None:  # fmt: skip
    """ids are int64 [B, T] in [0, vocabulary), lengths integers [B] in 1..T. Values are read on the CPU alone."""
    if not isinstance(ids, torch.Tensor) or ids.dtype is not torch.int64 or ids.dim() != 2 or 0 in ids.shape:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(
            f"{owner}: {name}: expected token ids, int64 [B, T] with at least one token, got {got}; make them with"
            f" torch.tensor(lists)"
        )
    if lengths is not None and (lengths.shape != ids.shape[:1] or lengths.is_floating_point()):
        raise ValueError(
            f"{owner}: {name} lengths: expected integers [{len(ids)}], one a sequence, got {lengths.dtype}"
            f" {tuple(lengths.shape)}; count the tokens of each"
        )
    if not ids.is_cpu or observed():
        return
    for what, x, least, most in (
        (name, ids, 0, vocabulary - 1),
        *(() if lengths is None else ((f"{name} lengths", lengths, 1, ids.size(1)),)),
    ):
        low, high = (int(v) for v in torch.aminmax(x))
        if low < least or high > most:
            raise ValueError(
                f"{owner}: {what}: expected {least} to {most}, got {low if low < least else high}; "
                + ("the model is for another vocabulary" if x is ids else "lengths count a sequence's own tokens")
            )


def check_end(owner: str, end: int, vocabulary: int) -> None:
    if not 0 <= end < vocabulary:
        raise ValueError(f"{owner}: end: expected a token id in [0, {vocabulary}), got {end}; pass the tokenizer's end")


def prompt_ids(owner: str, prompt: torch.Tensor, vocabulary: int, device: torch.device) -> torch.Tensor:
    """Token ids [T] as a batch [1, T] on the device."""
    ids = torch.as_tensor(prompt, dtype=torch.int64, device="cpu")
    if ids.dim() != 1:
        raise ValueError(f"{owner}: prompt: expected token ids [T] of one sequence, got shape {tuple(ids.shape)}")
    check_ids(owner, "prompt", ids[None], vocabulary)
    return ids[None].to(device)


def targets(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """ids [B, T] with IGNORED behind each sequence's own tokens."""
    place = torch.arange(ids.size(1), device=ids.device)
    return ids.masked_fill(place >= lengths[:, None], IGNORED)


def delayed(ids: torch.Tensor, first: int) -> torch.Tensor:
    """What a decoder is given for the targets ids [B, T]: the tokens before them, `first` before the first."""
    return torch.cat([ids.new_full((len(ids), 1), first), ids[:, :-1]], 1)


@torch.no_grad()
def steps(
    decoder: Decoder, first: torch.Tensor | None, choose: Choose | None, longest: int, end: int
) -> Iterator[list[int]]:  # fmt: skip
    """Each step's tokens of B sequences, written behind the tokens first [B]; `end` for sequences that have ended.

    It stops when all have, or after `longest` steps.
    """
    _check.positive("generate", longest=longest)
    ids, ended = first, None
    for _ in range(longest):
        logits = decoder.step(ids)
        ended = ended or [False] * len(logits)
        if choose is None:
            chosen = logits.argmax(-1).tolist()
        else:
            chosen = [end if over else int(choose(row)) for row, over in zip(logits, ended, strict=True)]
        chosen = [end if over else token for token, over in zip(chosen, ended, strict=True)]
        ended = [token == end for token in chosen]
        if all(ended):
            return
        yield chosen
        ids = torch.tensor(chosen, device=logits.device)


def written(decoder: Decoder, first: torch.Tensor, choose: Choose | None, longest: int, end: int) -> list[list[int]]:
    """All of `steps`, a list a sequence, without `end`."""
    columns = list(steps(decoder, first, choose, longest, end))
    return [[column[k] for column in columns if column[k] != end] for k in range(len(first))]
