"""Speculative decoding: a smaller model proposes tokens, and the model looks at several of them in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from genai_fast.contract import offers
from genai_fast.models.common import checks
from genai_fast.models.common.generation import Sampler, checked_prompt, decoder_for
from genai_fast.models.common.protocol import Decoder, Verifies, WritesOn


def speculate(
    model: WritesOn,
    draft: WritesOn,
    prompt_ids: torch.Tensor | Sequence[int],
    *,
    max_tokens: int,
    sampler: Sampler,
    ahead: int = 4,
    stop_id: int | None = None,
    weights: str = "float32",
) -> Iterator[int]:
    """What `generate` writes, with fewer calls of the model where the draft's proposals are taken.

    Drawn tokens have the distribution that the model alone gives them: a proposal x of the draft, drawn from q, is
    taken with probability min(1, p(x) / q(x)), else a token is drawn from what p has more than q. At temperature 0 they
    are the same tokens.

    Args:
        model, draft: a GPT or a Llama each, of one vocabulary and tokenizer.
        prompt_ids, max_tokens, stop_id, weights: as of `generate`.
        sampler: of the model and of the draft.
        ahead: tokens that the draft proposes at a time.

    Raises: TypeError, ValueError on arguments that do not fit, at the call.
    Source: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
    """
    checks.positive("speculate", max_tokens=max_tokens, ahead=ahead)
    if not isinstance(sampler, Sampler):
        raise TypeError(f"speculate: sampler: expected a Sampler, got {type(sampler).__name__}")
    decoders = [decoder_for(one, 1, weights if one is model else "float32") for one in (model, draft)]
    for name, decoder in zip(("model", "draft"), decoders, strict=True):
        if not offers(decoder, Verifies):
            raise TypeError(
                f"speculate: {name}: expected a GPT or a Llama, got one that {type(decoder).__name__} decodes"
            )
    if draft.vocabulary != model.vocabulary:
        raise ValueError(
            f"speculate: draft: expected a vocabulary of {model.vocabulary} as the model has, got {draft.vocabulary}"
        )
    prompt = checked_prompt(prompt_ids, model.vocabulary, model.block, stop_id)
    proposer = _Draft(decoders[1], draft.block, sampler)
    return _tokens(decoders[0], proposer, sampler, prompt, model.block, max_tokens, ahead, stop_id)


def _tokens(
    decoder: Decoder, draft: _Draft, sampler: Sampler, text: list[int], block: int, most: int, ahead: int,
    stop_id: int | None,
) -> Iterator[int]:  # fmt: skip
    """As generation's: when the cache is full, it starts again with the last half of a block."""
    left, fresh = most, text[-block:]
    while left:
        before, proposed, q = decoder.length, [], None
        if before in (0, block):
            p = sampler.probabilities(decoder.prefill(torch.tensor([fresh])))
        else:
            proposed, q = draft.propose(text, min(ahead, block - before - 1, left - 1))
            p = sampler.probabilities(decoder.extend(torch.tensor([fresh + proposed]))[0])
        taken, last = _accepted(p, q, proposed, sampler)
        if proposed:
            decoder.rewind(before + 1 + taken)
        for token in [*proposed[:taken], last]:
            if token == stop_id:
                return
            yield token
            text.append(token)
            left -= 1
        fresh = text[-max(block // 2, 1) :] if decoder.length == block else [last]


def _accepted(p: torch.Tensor, q: torch.Tensor | None, proposed: list[int], sampler: Sampler) -> tuple[int, int]:
    """(how many of the proposed tokens are taken, the token after them); p [k + 1, V], q [k, V]."""
    for k, token in enumerate(proposed):
        assert q is not None
        if sampler.uniform() * q[k, token] >= p[k, token]:
            rest = (p[k] - q[k]).clamp(min=0)
            return k, sampler.pick(rest if rest.any() else p[k])
    return len(proposed), sampler.pick(p[len(proposed)])


class _Draft:
    """A decoder that follows a text, some of which it may have to forget."""

    def __init__(self, decoder: Decoder, block: int, sampler: Sampler) -> None:
        self._decoder, self._block, self._sampler = decoder, block, sampler
        self._seen: list[int] = []  # by the decoder, its first token at `_begin` of the text
        self._begin = 0

    def propose(self, text: list[int], count: int) -> tuple[list[int], torch.Tensor | None]:
        """(tokens that may follow, of what probabilities [count, V] they were drawn)."""
        count = min(count, self._block)
        if count < 1:
            return [], None
        logits, drawn, q = self._followed(text, count), [], []
        for k in range(count):
            q.append(self._sampler.probabilities(logits[0]))
            drawn.append(self._sampler.pick(q[-1]))
            if k < count - 1:
                logits = self._decoder.step(torch.tensor(drawn[-1:]))
                self._seen.append(drawn[-1])
        return drawn, torch.stack(q)

    def _followed(self, text: list[int], count: int) -> torch.Tensor:
        """Logits [1, V] behind the text, of a decoder with room for `count` tokens."""
        known, new = 0, text[self._begin :]
        limit = min(len(self._seen), len(new) - 1)  # one token at least is looked at
        while known < limit and self._seen[known] == new[known]:
            known += 1
        if known and len(new) + count - 1 <= self._block:
            self._decoder.rewind(known)
            self._seen = new
            return self._decoder.extend(torch.tensor([new[known:]]))[:, -1]
        kept = max(min(self._block // 2, self._block - count + 1), 1)
        self._begin = max(len(text) - kept, 0)
        self._seen = text[self._begin :]
        return self._decoder.prefill(torch.tensor([self._seen]))
