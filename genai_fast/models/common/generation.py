"""Text, a token at a time: sampling from logits, and decoders that keep what they have seen.

A decoder serves one model and a fixed number of rows: `prefill(ids [B, T]) -> logits [B, V]` starts again with T tokens
per row, `step(ids [B]) -> logits [B, V]` appends one more. Both give the logits of the token that comes next, what
the model's forward gives at its last position, always in evaluation and in the weights' own dtype.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import nn

from genai_fast.contract import offers
from genai_fast.models.common import checks
from genai_fast.models.common.latents import evaluating
from genai_fast.models.common.protocol import Choose, Decoder, Request, WritesOn

_FEW = 256  # of a vocabulary


def generate(
    model: WritesOn,
    prompt_ids: torch.Tensor | Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_id: int | None = None,
    weights: str = "float32",
) -> Iterator[int]:
    """The tokens that follow the prompt, each as soon as it is drawn.

    A GPT sees `model.block` tokens at most. Of a longer prompt the last `block` count, with a warning. When its cache
    is full, it starts again with the last block // 2 tokens (at least one), so that what it sees is between half a
    block and a block.

    Args:
        model: a GPT or an LSTMLanguageModel, on any device; dropout is off while it generates, and it stays in the mode
            that it is in. Its weights must stay too: between two tokens a step of training raises, or mixes what both
            models have seen.
        prompt_ids: [T], T >= 1, integers in [0, vocabulary).
        max_tokens: the most to generate, at least 1.
        temperature, top_k, top_p, min_p, seed: as `Sampler` takes them.
        repetition_penalty: as of `penalized`, for all tokens of the prompt and those generated; 1: none.
        stop_id: a token that ends the text and is not given out; None: none does.
        weights: as `decoder_for` takes it.

    Raises: TypeError, ValueError on arguments that do not fit, at the call.
    """
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    return _generated(model, prompt_ids, sampler, max_tokens, stop_id, weights, repetition_penalty)


class WriteOn:
    """What a model with `cached_decoder` and `vocabulary` needs for `protocol.Writes`."""

    continues: ClassVar[bool] = True

    def write_ids(self, request: Request) -> Iterator[int]:
        """See `protocol.Writes`."""
        prompt, end, sampler, longest, _, weights, penalty = request
        return _generated(self, prompt or [end], sampler, longest, end, weights, penalty)


def checked_prompt(
    prompt_ids: torch.Tensor | Sequence[int], vocabulary: int, block: int | None, stop_id: int | None
) -> list[int]:
    """The prompt's ids; a longer one than a block is cut, with a warning. Raises as `generate`."""
    prompt = torch.as_tensor(prompt_ids, device="cpu")
    if prompt.dim() != 1 or not len(prompt):
        raise ValueError(
            f"generate: prompt_ids: expected token ids [T], T >= 1, got shape {tuple(prompt.shape)}; an empty text"
            f" begins with the tokenizer's end token"
        )
    checks.token_ids("generate", "prompt_ids", prompt[None], vocabulary)
    if stop_id is not None and not 0 <= stop_id < vocabulary:
        raise ValueError(f"generate: stop_id: expected a token id from 0 to {vocabulary - 1}, got {stop_id}")
    if block and len(prompt) > block:
        warnings.warn(
            f"generate: the prompt has {len(prompt)} tokens, the model sees {block}: the first {len(prompt) - block}"
            f" are cut",
            stacklevel=4,
        )
    return prompt.tolist()


def _generated(
    model: WritesOn, prompt_ids: torch.Tensor | Sequence[int], sampler: Choose, max_tokens: int, stop_id: int | None,
    weights: str, penalty: float = 1.0,
) -> Iterator[int]:  # fmt: skip
    checks.positive("generate", max_tokens=max_tokens)
    if not 0 < penalty < math.inf:
        raise ValueError(f"generate: repetition_penalty: expected a finite number above 0, got {penalty}")
    decoder = decoder_for(model, 1, weights)
    block = getattr(model, "block", None)
    prompt = checked_prompt(prompt_ids, model.vocabulary, block, stop_id)
    return _tokens(decoder, sampler, prompt, block, max_tokens, stop_id, penalty)


def _tokens(
    decoder: Decoder, sampler: Choose, context: list[int], block: int | None, most: int, stop_id: int | None,
    penalty: float,
) -> Iterator[int]:  # fmt: skip
    held, fresh, seen = 0, context[-block:] if block else context, set(context)
    for _ in range(most):
        if held == 0:
            logits, held = decoder.prefill(torch.tensor([fresh])), len(fresh)
        else:
            logits, held = decoder.step(torch.tensor(fresh)), held + 1
        token = int(sampler(logits if penalty == 1.0 else penalized(logits, [*seen], penalty)))
        if token == stop_id:
            return
        yield token
        seen.add(token)
        fresh = [token]
        if block:
            context = [*context[-block:], token]
            if held == block:
                held, fresh = 0, context[-max(block // 2, 1) :]


def penalized(logits: torch.Tensor, seen: Sequence[int], penalty: float) -> torch.Tensor:
    """Logits [..., V] in which those of the tokens `seen` are divided by the penalty if positive, else multiplied.

    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858; of negative logits as transformers has it.
    """
    index = torch.as_tensor(seen, device=logits.device)
    chosen = logits[..., index]
    return logits.index_copy(-1, index, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


class Sampler:
    """Draws tokens from logits: of temperature, then the top_k likeliest, then the least that make up top_p.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest, always the same.
        top_k: only the k most likely tokens can be drawn; 0: all.
        top_p: only the likeliest whose probabilities sum to at least this share, in (0, 1]. Of both: what is as
            likely as the last of them can come too, so that no order matters.
        min_p: only tokens at least this many times as likely as the likeliest, in [0, 1]; 0: all.
        seed: gives the same tokens for the same logits, on every device, as draws are made on the CPU; None draws from
            torch's default generator.

    Raises: TypeError, ValueError on arguments that do not fit.
    Source: top-k: Fan et al. 2018, arXiv:1805.04833; top-p: Holtzman et al. 2019, arXiv:1904.09751; min-p: Nguyen et
        al. 2024, arXiv:2407.01082.
    """

    def __init__(
        self, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Sampler: {name}: expected a float, got {value!r}")
        for name, value in (("top_k", top_k), ("seed", seed)):
            if isinstance(value, bool) or (not isinstance(value, int) and (name, value) != ("seed", None)):
                raise TypeError(f"Sampler: {name}: expected an int, got {value!r}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"Sampler: temperature: expected a finite number >= 0, got {temperature}")
        if top_k < 0:
            raise ValueError(f"Sampler: top_k: expected at least 1, or 0 for all, got {top_k}")
        if not 0 < top_p <= 1:
            raise ValueError(f"Sampler: top_p: expected 0 < top_p <= 1, got {top_p}")
        if not 0 <= min_p <= 1:
            raise ValueError(f"Sampler: min_p: expected 0 <= min_p <= 1, got {min_p}")
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., V], floating -> tokens [...], int64, on the CPU.

        Raises: ValueError where a row's largest logit is infinite or NaN.
        """
        x = logits.detach().to(logits.device if logits.is_cuda else "cpu", torch.float64)
        largest = x.amax(-1, keepdim=True)
        if not largest.isfinite().all():
            raise ValueError(
                "Sampler: logits: expected finite ones, got infinity or NaN; the model has diverged: take an earlier"
                " checkpoint"
            )
        if self.temperature == 0:
            return x.argmax(-1).cpu()
        x, tokens = (x - largest) / self.temperature, None
        if self.top_k or self.top_p < 1 or self.min_p:
            least = self._least(x)
            # Only those that can come, in the vocabulary's order.
            most = max((x >= least).sum(-1).flatten().tolist(), default=1)
            tokens = x.topk(most, sorted=False).indices.sort(-1).values
            x = x.gather(-1, tokens)
            x = x.masked_fill(x < least, -math.inf)  # other rows have more
        # The inverse of the distribution function at one uniform number for each token.
        weights = x.exp()
        sums = weights.cumsum(-1)
        uniform = torch.rand(*x.shape[:-1], 1, dtype=torch.float64, generator=self._generator).to(x.device)
        drawn = torch.searchsorted(sums, uniform * sums[..., -1:], right=True)
        # Rounding may lead past the last that can come.
        drawn = drawn.minimum((weights > 0).cumsum(-1).argmax(-1, keepdim=True))
        return (drawn if tokens is None else tokens.gather(-1, drawn)).squeeze(-1).cpu()

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of each token, as `__call__` draws it: logits [..., V] -> [..., V] float64 on the CPU."""
        x = logits.detach().to("cpu", torch.float64)
        if self.temperature == 0:
            return torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.0)
        x = (x - x.amax(-1, keepdim=True)) / self.temperature
        if self.top_k or self.top_p < 1 or self.min_p:
            x = x.masked_fill(x < self._least(x), -math.inf)
        return x.softmax(-1)

    def uniform(self) -> float:
        """The next of the numbers in [0, 1) that it draws by."""
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    def pick(self, probabilities: torch.Tensor) -> int:
        """A token of these probabilities [V], which need not add up to 1."""
        sums = probabilities.cumsum(0)
        drawn = int(torch.searchsorted(sums, self.uniform() * sums[-1:], right=True))
        return min(drawn, int(probabilities.nonzero()[-1]))

    def _least(self, x: torch.Tensor) -> torch.Tensor:
        """The least that can come, [..., 1]; the largest of x is 0."""
        lowest = math.log(self.min_p) if self.min_p else -math.inf
        if not self.top_k and self.top_p == 1:
            return torch.full_like(x[..., :1], lowest)
        return self._of_likeliest(x).clamp(min=lowest)

    def _of_likeliest(self, x: torch.Tensor) -> torch.Tensor:
        """The least of the top_k, and of these of those that make up top_p."""
        if self.top_k:
            best = x.topk(min(self.top_k, x.size(-1))).values
            weights = best.exp()
            whole = weights.sum(-1, keepdim=True)
        else:  # top_p alone: the likeliest mostly make it up, and sorting a vocabulary takes long
            whole, count = x.exp().sum(-1, keepdim=True), _FEW
            while True:
                best = x.topk(min(count, x.size(-1))).values
                weights = best.exp()
                if count >= x.size(-1) or (weights.sum(-1, keepdim=True) >= self.top_p * whole).all():
                    break
                count *= 8
        if self.top_p == 1:
            return best[..., -1:]
        likelier = weights.cumsum(-1) - weights  # the sum of those before each
        return best.gather(-1, (likelier < self.top_p * whole).sum(-1, keepdim=True) - 1)


def decoder_for(model: WritesOn, batch: int, weights: str = "float32") -> Decoder:
    """What decodes `batch` rows of this model's text (see the module's docstring).

    A float32 GPT on a CPU whose modules are as it made them is decoded by `ops.GPTDecoder`, one C++ call a token, which
    can round matrices; changed modules (adapters, hooks, another head) are called:

    Args:
        weights: "float32"; there also "bfloat16" or "int8", which are faster and less exact.

    Raises: TypeError, ValueError on arguments that do not fit.
    """
    checks.positive("decoder_for", batch=batch)
    if not offers(model, WritesOn):
        raise TypeError(f"decoder_for: model: expected a GPT or an LSTMLanguageModel, got {type(model).__name__}")
    return model.cached_decoder(batch, weights)


def unrounded(weights: str, owner: str) -> None:
    """Raises ValueError unless the weights are to be as they are."""
    if weights != "float32":
        raise ValueError(
            f"decoder_for: weights: expected 'float32' for {owner}, got {weights!r}; only ops.GPTDecoder rounds them"
        )


def check_rows(ids: torch.Tensor, batch: int) -> None:
    if len(ids) != batch:
        raise ValueError(f"decoder: ids: expected {batch} rows, got {len(ids)}; make a decoder for another batch")


@contextlib.contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """In evaluation and without autocast, so that a step computes what the steps before it have."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, enabled=False), evaluating(model) if model.training else contextlib.nullcontext():
        yield
