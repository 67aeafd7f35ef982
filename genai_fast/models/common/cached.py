"""Models of text that keep the keys and values of all tokens so far; on CUDA a step is one captured graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from genai_fast import autotune, ops
from genai_fast.capture import aside, capture
from genai_fast.models.common import checks
from genai_fast.models.common.generation import as_it_is, check_rows

Step = Callable[[torch.Tensor], torch.Tensor]  # ids [B] -> logits [B, V]


class Sizes(NamedTuple):
    layers: int
    heads: int  # of keys and values
    block: int
    head_dim: int


class CachedModel:
    """A model with the keys and values of all tokens so far; on CUDA a step is one captured graph.

    Weights may change between the calls, but on CUDA only in place. The model has `block`, `vocabulary`, `lm_head` and
    `check_ids`; a subclass says how it runs.

    Attributes:
        path: how a step is computed. "modules": by the model's own; a subclass may know another way, taken where the
            first step measures it the faster (genai_fast.autotune remembers that; GENAI_FAST_DETERMINISTIC=1 pins
            "modules").
    """

    def __init__(self, model: nn.Module, batch: int, sizes: Sizes) -> None:
        weight = next(model.parameters())
        shape = (sizes.layers, batch, sizes.heads, sizes.block, sizes.head_dim)
        self._model, self._batch, self._held = model, batch, 0
        self._keys, self._values = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        self._lengths = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        self.path = "modules"
        self._capture = weight.is_cuda
        self._replay: Step | None = None

    def _run(self, ids: torch.Tensor, lengths: torch.Tensor | None, attend: Callable[..., torch.Tensor]) -> Any:
        """Ids [B, T] behind `lengths` tokens ([B]; None: 0) -> what the head multiplies, [B, T, C]."""
        raise NotImplementedError

    def _scores(self, layer: int) -> dict[str, Any]:
        """Settings of a layer's attention: window, softcap."""
        return {}

    def _ways(self) -> dict[str, Step]:
        """Ways to compute a step, "modules" first."""
        return {"modules": self._by_modules}

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Forget all and begin with ids [B, T], T <= block -> logits [B, V] of the next token."""
        ids = ids.to(self._lengths.device)
        check_rows(ids, self._batch)
        self._model.check_ids(ids)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self._keys[layer, :, :, : k.size(2)] = k
            self._values[layer, :, :, : v.size(2)] = v
            return ops.causal_attention(q, k, v, **self._scores(layer))

        with as_it_is(self._model):
            y = self._run(ids, None, attend)
            self._held = ids.size(1)
            self._lengths.fill_(self._held)
            return self._model.lm_head(y[:, -1])

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Append ids [B] -> logits [B, V] of the next token."""
        check_rows(ids, self._batch)
        owner = type(self).__name__
        if not 0 < self._held < self._model.block:
            raise ValueError(
                f"{owner}: step: expected 1 to {self._model.block - 1} tokens before this one, got {self._held};"
                f" remedy: prefill"
            )
        checks.token_ids(owner, "ids", ids[:, None], self._model.vocabulary)  # not checked on a GPU
        ids = ids.to(self._lengths.device)
        with as_it_is(self._model):
            if self._capture and self._replay is None:
                self._replay = self._captured(ids)
            logits = (self._replay or self._by_modules)(ids)
        self._held += 1
        return logits

    @torch.no_grad()
    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """Append ids [B, T] -> logits [B, T, V] of the token after each, by the model's modules."""
        ids = ids.to(self._lengths.device)
        check_rows(ids, self._batch)
        self._model.check_ids(ids)
        if not 0 < self._held <= self._model.block - ids.size(1):
            raise ValueError(
                f"{type(self).__name__}: extend: expected 1 to {self._model.block - ids.size(1)} tokens before these,"
                f" got {self._held}; remedy: prefill"
            )
        self._lengths.fill_(self._held)
        with as_it_is(self._model):
            logits = self._model.lm_head(self._run(ids, self._lengths, self._attend))
        self._held += ids.size(1)
        self._lengths.fill_(self._held)
        return logits

    @property
    def length(self) -> int:
        """Tokens that it has seen."""
        return self._held

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        if not 0 <= length <= self._held:
            raise ValueError(f"{type(self).__name__}: length: expected 0 to {self._held}, got {length}")
        self._held = length
        self._lengths.fill_(self._held)

    def _captured(self, ids: torch.Tensor) -> Step:
        """The step as a graph, by its modules or another way, whichever is the faster."""
        ways, graphs = self._ways(), {}

        def maker(name: str) -> autotune.Maker:
            def make() -> Callable[[], Any]:
                graphs[name] = graphed(ways[name], ids, self._lengths)

                def replay() -> None:
                    self._lengths.fill_(self._held)  # each replay moves them on
                    graphs[name](ids)

                return replay

            return make

        if len(ways) > 1:
            kind = type(self._model).__name__
            family = (f"step of a {kind}", "vocabulary", self._model.vocabulary, self._keys.dtype)
            makers, shape = {name: maker(name) for name in ways}, tuple(self._keys.shape)
            self.path = autotune.choose(family, shape, self._lengths.device, lambda: (makers, "modules")).name
            self._lengths.fill_(self._held)
        return graphs.get(self.path) or graphed(ways[self.path], ids, self._lengths)

    def _by_modules(self, ids: torch.Tensor) -> torch.Tensor:
        y = self._run(ids[:, None], self._lengths, self._attend)
        self._lengths += 1
        return self._model.lm_head(y[:, 0])

    def _attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache = self._keys[layer], self._values[layer]
        return ops.decode_attention(q, *cache, self._lengths, k, v, **self._scores(layer))


def places(lengths: torch.Tensor, count: int) -> torch.Tensor:
    """Positions [B, T] int64 of T tokens behind `lengths` [B]."""
    return lengths[:, None].long() + torch.arange(count, device=lengths.device)


def graphed(function: Step, x: torch.Tensor, state: torch.Tensor) -> Step:
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
