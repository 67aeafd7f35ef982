"""What models of sequences share: losses, checks, padding, and decoding step by step."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from genai_fast.models.common import checks
from genai_fast.models.common.protocol import Choose

IGNORED = -100  # a target that does not count, as for F.cross_entropy


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


def check_ids(owner: str, name: str, ids: torch.Tensor, vocabulary: int, lengths: torch.Tensor | None = None) -> None:
    """ids are [B, T] in [0, vocabulary), lengths integers [B] in 1..T. Values are looked at on a CPU alone."""
    checks.token_ids(owner, name, ids, vocabulary)
    if lengths is None:
        return
    if lengths.shape != ids.shape[:1] or lengths.is_floating_point():
        raise ValueError(
            f"{owner}: {name} lengths: expected integers [{len(ids)}], one a sequence, got {lengths.dtype}"
            f" {tuple(lengths.shape)}; count the tokens of each"
        )
    if lengths.is_cpu and lengths.numel() and not torch.compiler.is_compiling():
        least, most = (int(value) for value in torch.aminmax(lengths))
        if least < 1 or most > ids.size(1):
            raise ValueError(
                f"{owner}: {name} lengths: expected 1 to {ids.size(1)}, the tokens of the longest, got"
                f" {least if least < 1 else most}; count each sequence's own tokens"
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


def steps(
    decoder: Decoder, first: torch.Tensor | None, choose: Choose | None, longest: int, end: int
) -> Iterator[list[int]]:
    """Each step's tokens of B sequences, written behind the tokens first [B]; `end` for sequences that have ended.

    It stops when all have, or after `longest` steps.
    """
    checks.positive("generate", longest=longest)
    return _steps(decoder, first, choose, longest, end)


@torch.no_grad()
def _steps(decoder, ids, choose, longest, end):
    ended = None
    for _ in range(longest):
        logits = decoder.step(ids)
        chosen = logits.argmax(-1) if choose is None else choose(logits).to(logits.device)
        ids = chosen if ended is None else torch.where(ended, end, chosen)
        ended = ids == end
        column = ids.tolist()
        if all(token == end for token in column):
            return
        yield column


def written(decoder: Decoder, first: torch.Tensor, choose: Choose | None, longest: int, end: int) -> list[list[int]]:
    """All of `steps`, a list a sequence, without `end`."""
    columns = list(steps(decoder, first, choose, longest, end))
    return [[column[k] for column in columns if column[k] != end] for k in range(len(first))]


def streamed(
    decoder: Decoder, first: torch.Tensor | None, choose: Choose | None, longest: int, end: int
) -> Iterator[int]:
    """`steps` of one sequence, a token at a time."""
    return (token for (token,) in steps(decoder, first, choose, longest, end))
