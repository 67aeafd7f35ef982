"""Text from models: tokens to words as they come, stop strings, and sentences that repeat left out."""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from genai_fast.contract import offers
from genai_fast.data.text import Tokenizer
from genai_fast.errors import UsageError
from genai_fast.models import Sampler
from genai_fast.models.common.latents import evaluating
from genai_fast.models.common.protocol import Request, Writes, WritesOn
from genai_fast.models.common.speculation import speculate

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Style:
    """How a text is drawn.

    temperature: 0 takes the likeliest token; top_k: among the k likeliest, 0 for all; top_p: among the likeliest
    that make up this much of the probability; min_p: among those at least this many times as likely as the likeliest;
    repetition_penalty: of tokens that have been there, 1 for none; stop: strings at which the text ends, left out of
    it; repeats: False leaves out sentences that have been written before; seed: None for another text each time.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95
    seed: int | None = 1
    stop: tuple[str, ...] = ()
    repeats: bool = True
    weights: str = "float32"
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value, good, expected in (
            ("max-tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "a number >= 0"),
            ("top-k", self.top_k, self.top_k >= 0, "at least 0 (0: all tokens)"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "a number > 0 and <= 1"),
            ("min-p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition-penalty", self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "a number > 0"),
            ("stop", self.stop, all(self.stop), "strings that are not empty"),
        ):
            if not good:
                raise UsageError(f"--{name}: expected {expected}, got {value}")


def write(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, style: Style, draft: nn.Module | None = None
) -> Iterator[str]:
    """What the model writes behind the prompt (or as its answer), in pieces, as they come.

    Ends at the token that ends a document, at a stop string, or after `style.max_tokens`. A draft proposes tokens, see
    `speculation.speculate`.
    """
    with evaluating(model):
        tokens = _tokens(model, tokenizer, prompt, style, draft)
        pieces = _decoded(tokenizer, itertools.takewhile(lambda token: token not in tokenizer.others, tokens))
        pieces = _until(pieces, style.stop) if style.stop else pieces
        yield from pieces if style.repeats else _without_repeats(pieces, prompt)


def example(model: nn.Module, tokenizer: Tokenizer, seed: int, tokens: int) -> str:
    """A text of that many tokens, begun by the model itself."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return "".join(write(model, tokenizer, "", Style(max_tokens=tokens, seed=seed)))


def _tokens(
    model: Writes, tokenizer: Tokenizer, prompt: str, style: Style, draft: nn.Module | None = None
) -> Iterator[int]:
    if style.repetition_penalty != 1 and not offers(model, WritesOn):
        raise UsageError(
            f"--repetition-penalty: expected a run of gpt, llama or lstm, got a {type(model).__name__}; remedy: omit it"
        )
    sampler = Sampler(
        temperature=style.temperature, top_k=style.top_k, top_p=style.top_p, min_p=style.min_p, seed=style.seed
    )
    if draft is not None:
        if style.repetition_penalty != 1:
            raise UsageError("--repetition-penalty: expected none with --draft, got one; remedy: omit one of the two")
        ids, settings = tokenizer.encode(prompt) or [tokenizer.end], {"sampler": sampler, "weights": style.weights}
        try:
            return speculate(model, draft, ids, max_tokens=style.max_tokens, stop_id=tokenizer.end, **settings)
        except TypeError as error:
            raise UsageError(f"--draft: {error}") from error
    ids, how = tokenizer.encode(prompt), (style.seed, style.weights, style.repetition_penalty)
    return model.write_ids(Request(ids, tokenizer.end, sampler, style.max_tokens, *how))


def _decoded(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    stream = tokenizer.stream()
    for token in ids:
        if piece := stream.put(token):
            yield piece
    if piece := stream.close():
        yield piece


def _until(pieces: Iterable[str], stops: tuple[str, ...]) -> Iterator[str]:
    """The text before the first stop string; what may be the beginning of one waits."""
    held = ""
    for piece in pieces:
        held += piece
        found = [k for k in (held.find(stop) for stop in stops) if k >= 0]
        if found:
            if held := held[: min(found)]:
                yield held
            return
        longest = max(map(len, stops)) - 1
        ends = (n for n in range(min(longest, len(held)), 0, -1) if any(s.startswith(held[-n:]) for s in stops))
        wait = next(ends, 0)
        if ready := held[: len(held) - wait]:
            yield ready
        held = held[len(held) - wait :]
    if held:
        yield held


def _without_repeats(pieces: Iterable[str], prompt: str) -> Iterator[str]:
    """Sentence by sentence; one that came before, in the prompt too, is left out."""
    seen = {_key(sentence) for sentence in _SENTENCE.split(prompt)[:-1]}
    held = ""

    def new(sentence: str) -> bool:
        key = _key(sentence)
        return not key or not (key in seen or seen.add(key))

    for piece in pieces:
        held += piece
        while end := _SENTENCE.search(held):
            if end.end() == len(held):  # more space may follow
                break
            sentence, held = held[: end.end()], held[end.end() :]
            if new(sentence):
                yield sentence
    if held and new(held):
        yield held


def _key(sentence: str) -> str:
    return " ".join(sentence.lower().split())
