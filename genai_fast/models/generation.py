"""Text, a token at a time: sampling from logits, and decoders that keep what they have seen.

A decoder serves one model and a fixed number of rows: `prefill(ids [B, T]) -> logits [B, V]` begins anew with T tokens
a row, `step(ids [B]) -> logits [B, V]` goes on with one more. Both give the logits of the token that comes next, what
the model's forward gives at its last position, always in evaluation and in the weights' own dtype.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from genai_fast import autotune, ops
from genai_fast.backends import choose, forced_backend
from genai_fast.capture import aside, capture
from genai_fast.fusion.chains import obstacle
from genai_fast.models import _check, _decode
from genai_fast.models.gpt import GPT
from genai_fast.models.latents import evaluating
from genai_fast.models.lstm_lm import LSTMLanguageModel, State

_FEW = 256  # of a vocabulary


class Decoder(Protocol):
    """What `decoder_for` returns."""

    def prefill(self, ids: torch.Tensor) -> torch.Tensor: ...

    def step(self, ids: torch.Tensor) -> torch.Tensor: ...


def generate(
    model: GPT | LSTMLanguageModel,
    prompt_ids: torch.Tensor | Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_id: int | None = None,
    weights: str = "float32",
) -> Iterator[int]:
    """The tokens that follow the prompt, each as soon as it is drawn.

    A GPT sees `model.block` tokens at most. Of a longer prompt the last `block` count, with a warning. When its cache
    is full, it begins anew with the last block // 2 tokens (at least one), so that what it sees is between half a
    block and a block.

    Args:
        model: on any device; dropout is off while it generates, and it stays in the mode that it is in. Its weights
            must stay too: between two tokens a step of training raises, or mixes what both models have seen.
        prompt_ids: [T], T >= 1, integers in [0, vocabulary).
        max_tokens: the most to generate, at least 1.
        temperature, top_k, top_p, seed: as `Sampler` takes them.
        stop_id: a token that ends the text and is not given out; None: none does.
        weights: as `decoder_for` takes it.

    Raises: TypeError, ValueError on arguments that do not fit, at the call.
    """
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    _check.positive("generate", max_tokens=max_tokens)
    decoder = decoder_for(model, 1, weights)
    prompt = torch.as_tensor(prompt_ids, device="cpu")
    if prompt.dim() != 1 or not len(prompt):
        raise ValueError(
            f"generate: prompt_ids: expected token ids [T], T >= 1, got shape {tuple(prompt.shape)}; an empty text"
            f" begins with the tokenizer's end token"
        )
    _check.token_ids("generate", "prompt_ids", prompt[None], model.vocabulary)
    if stop_id is not None and not 0 <= stop_id < model.vocabulary:
        raise ValueError(f"generate: stop_id: expected a token id from 0 to {model.vocabulary - 1}, got {stop_id}")
    block = model.block if isinstance(model, GPT) else None
    if block and len(prompt) > block:
        warnings.warn(
            f"generate: the prompt has {len(prompt)} tokens, the model sees {block}: the first {len(prompt) - block}"
            f" are cut",
            stacklevel=2,
        )
    return _tokens(decoder, sampler, prompt.tolist(), block, max_tokens, stop_id)


def _tokens(
    decoder: Decoder, sampler: Sampler, context: list[int], block: int | None, most: int, stop_id: int | None
) -> Iterator[int]:
    held, fresh = 0, context[-block:] if block else context
    for _ in range(most):
        if held == 0:
            logits, held = decoder.prefill(torch.tensor([fresh])), len(fresh)
        else:
            logits, held = decoder.step(torch.tensor(fresh)), held + 1
        token = int(sampler(logits))
        if token == stop_id:
            return
        yield token
        fresh = [token]
        if block:
            context = [*context[-block:], token]
            if held == block:
                held, fresh = 0, context[-max(block // 2, 1) :]


class Sampler:
    """Draws tokens from logits: of temperature, then the top_k likeliest, then the least that make up top_p.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest, always the same.
        top_k: only so many of the likeliest can come; 0: all.
        top_p: only the likeliest whose probabilities sum to at least this share, in (0, 1]. Of both: what is as
            likely as the last of them can come too, so that no order matters.
        seed: gives the same tokens for the same logits, on every device, as draws are made on the CPU; None draws from
            torch's default generator.

    Raises: TypeError, ValueError on arguments that do not fit.
    Source: top-k: Fan et al. 2018, arXiv:1805.04833; top-p: Holtzman et al. 2019, arXiv:1904.09751.
    """

    def __init__(
        self, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None
    ) -> None:
        for name, value in (("temperature", temperature), ("top_p", top_p)):
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
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
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
        if self.top_k or self.top_p < 1:
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

    def _least(self, x: torch.Tensor) -> torch.Tensor:
        """The least that can come, [..., 1]."""
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


def decoder_for(model: nn.Module, batch: int, weights: str = "float32") -> Decoder:
    """What decodes `batch` rows of this model's text (see the module's docstring).

    A float32 GPT without hooks on a CPU is decoded by `ops.GPTDecoder`, one C++ call a token, which can round matrices:

    Args:
        weights: "float32"; there also "bfloat16" or "int8", which are faster and less exact.

    Raises: TypeError, ValueError on arguments that do not fit.
    """
    _check.positive("decoder_for", batch=batch)
    if isinstance(model, GPT):
        parameters = list(model.parameters())
        plain = all(p.is_cpu and p.dtype is torch.float32 for p in parameters)
        plain = plain and not any(map(obstacle, model.modules()))  # hooks are called by modules alone
        if plain and choose("gpt_decode", forced_backend(), "cpu")[0] == "cpu":
            return ops.GPTDecoder(model.state_dict(), model.heads, model.block, batch, weights)
        _exact(
            weights, f"a GPT of {parameters[0].dtype} on {parameters[0].device} that modules decode (hooks, no kernel)"
        )
        return CachedGPT(model, batch)
    if isinstance(model, LSTMLanguageModel):
        _exact(weights, "an LSTMLanguageModel")
        return CarriedLSTM(model, batch)
    raise TypeError(f"decoder_for: model: expected a GPT or an LSTMLanguageModel, got {type(model).__name__}")


def _exact(weights: str, owner: str) -> None:
    if weights != "float32":
        raise ValueError(
            f"decoder_for: weights: expected 'float32' for {owner}, got {weights!r}; only ops.GPTDecoder rounds them"
        )


class CachedGPT:
    """A GPT with the keys and values of all tokens so far; on CUDA a step is one captured graph.

    Weights may change between the calls, but on CUDA only in place.

    Attributes:
        path: how a step is computed. "modules": by the model's own; "kernels": by `ops.decode_linear`, on CUDA alone,
            for up to 16 rows of a model without hooks, where the first step measures it the faster (genai_fast.autotune
            remembers that; GENAI_FAST_DETERMINISTIC=1 pins "modules").
    """

    def __init__(self, model: GPT, batch: int) -> None:
        weight = model.transformer.wte.weight
        shape = (len(model.transformer.h), batch, model.heads, model.block, model.width // model.heads)
        self._model, self._batch, self._held = model, batch, 0
        self._keys, self._values = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        self._lengths = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        self.path = "modules"
        self._capture = weight.is_cuda
        self._replay: Callable[[torch.Tensor], torch.Tensor] | None = None

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Forget all and begin with ids [B, T], T <= block -> logits [B, V] of the next token."""
        ids = ids.to(self._lengths.device)
        _check_rows(ids, self._batch)
        self._model.check_ids(ids)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self._keys[layer, :, :, : k.size(2)] = k
            self._values[layer, :, :, : v.size(2)] = v
            return ops.causal_attention(q, k, v)

        with _as_it_is(self._model):
            y = self._model.run(ids, self._model.transformer.wpe.weight[: ids.size(1)], attend)
            self._held = ids.size(1)
            self._lengths.fill_(self._held)
            return self._model.lm_head(y[:, -1])

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Go on with ids [B] -> logits [B, V] of the next token."""
        _check_rows(ids, self._batch)
        if not 0 < self._held < self._model.block:
            raise ValueError(
                f"CachedGPT: step: expected 1 to {self._model.block - 1} tokens before this one, got {self._held};"
                f" remedy: prefill"
            )
        _check.token_ids("CachedGPT", "ids", ids[:, None], self._model.vocabulary)  # nobody looks at a GPU's
        ids = ids.to(self._lengths.device)
        with _as_it_is(self._model):
            if self._capture and self._replay is None:
                self._replay = self._captured(ids)
            logits = (self._replay or self._by_modules)(ids)
        self._held += 1
        return logits

    def _captured(self, ids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The step as a graph, by its modules or, where that is faster, by kernels."""
        ways, graphs = {"modules": self._by_modules, "kernels": self._by_kernels}, {}

        def maker(name: str) -> autotune.Maker:
            def make() -> Callable[[], Any]:
                graphs[name] = _graphed(ways[name], ids, self._lengths)

                def replay() -> None:
                    self._lengths.fill_(self._held)  # each replay moves them on
                    graphs[name](ids)

                return replay

            return make

        if _decode.serves(self._model, self._batch):
            family = ("step of a GPT", "vocabulary", self._model.vocabulary, self._keys.dtype)
            makers, shape = {name: maker(name) for name in ways}, tuple(self._keys.shape)
            self.path = autotune.choose(family, shape, self._lengths.device, lambda: (makers, "modules")).name
            self._lengths.fill_(self._held)
        return graphs.get(self.path) or _graphed(ways[self.path], ids, self._lengths)

    def _by_modules(self, ids: torch.Tensor) -> torch.Tensor:
        positions = self._model.transformer.wpe(self._lengths)[:, None]
        y = self._model.run(ids[:, None], positions, self._attend)
        self._lengths += 1
        return self._model.lm_head(y[:, 0])

    def _by_kernels(self, ids: torch.Tensor) -> torch.Tensor:
        logits = _decode.next_logits(self._model, ids, self._lengths, self._attend)
        self._lengths += 1
        return logits

    def _attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.decode_attention(q, self._keys[layer], self._values[layer], self._lengths, k, v)


class CarriedLSTM:
    """An LSTMLanguageModel and its state behind all tokens so far; that of training is left alone."""

    def __init__(self, model: LSTMLanguageModel, batch: int) -> None:
        self._model, self._batch = model, batch
        self._state: State | None = None

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Begin anew with ids [B, T] -> logits [B, V] of the next token."""
        self._state = None
        return self._run(ids)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Go on with ids [B] -> logits [B, V] of the next token."""
        return self._run(ids[:, None])

    @torch.no_grad()
    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        _check_rows(ids, self._batch)
        with _as_it_is(self._model):
            logits, self._state = self._model(ids.to(self._model.decoder.weight.device), self._state)
        return logits[:, -1]


def _check_rows(ids: torch.Tensor, batch: int) -> None:
    if len(ids) != batch:
        raise ValueError(f"decoder: ids: expected {batch} rows, got {len(ids)}; make a decoder for another batch")


@contextlib.contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """In evaluation and without autocast, so that a step computes what the steps before it have."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, enabled=False), evaluating(model) if model.training else contextlib.nullcontext():
        yield


def _graphed(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, state: torch.Tensor) -> Any:
    """function(x) as one CUDA graph; `state` is what it moves on and the warm-up must not."""
    static, before = x.clone(), state.clone()
    with aside(x.device):  # libraries set themselves up, kernels are compiled
        for _ in range(2):
            function(static)
            state.copy_(before)
    graph, result = capture(lambda: function(static), x.device)

    def replay(x: torch.Tensor) -> torch.Tensor:
        static.copy_(x)
        graph.replay()
        return result.clone()

    return replay
